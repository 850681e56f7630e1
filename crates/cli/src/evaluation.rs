//! `unveil eval` and `unveil report`: metrics and pages of answers.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::json;
use unveil_cli::{ConfigArgs, RoleArgs};
use unveil_config::Config;
use unveil_config::schema::Suite;
use unveil_core::{BoxForm, redact, stderr_line};
use unveil_data::image_root::PathPolicy;
use unveil_data::records::RecordFile;
use unveil_eval::{
    Bootstrap, EvalError, EvalSettings, EvaluatedAnswer, Evaluation, check_suite, evaluate, evaluate_responses,
    evaluate_withheld, load_usable_samples, measure_suite, rewarded_responses,
};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_report::ImageFolders;
use unveil_reward::Scoring;
use unveil_rollout::open_engine;

use crate::preflight::require_model_dir;

#[derive(Args)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    role: RoleArgs,
    /// Model directory.
    #[arg(long, required_unless_present = "responses")]
    model: Option<PathBuf>,
    /// Record file.
    #[arg(long, required_unless_present = "responses")]
    data: Option<PathBuf>,
    /// File of responses of any model, instead of a model and records.
    #[arg(long, conflicts_with_all = ["model", "data"])]
    responses: Option<PathBuf>,
    /// Box form of the answers: absolute, per_mille, qwen2_vl or llava; defaults to `model.boxes`.
    #[arg(long)]
    boxes: Option<BoxForm>,
    /// Evaluates this split only.
    #[arg(long, default_value = "", hide_default_value = true)]
    split: String,
    /// Metrics suite: summary, grounding or mau.
    #[arg(long, default_value = "summary", value_parser = parse_suite)]
    suite: SuiteChoice,
    /// Also writes one prediction per line to this file.
    #[arg(long)]
    predictions: Option<PathBuf>,
    /// Also prints a table on stderr.
    #[arg(long)]
    table: bool,
    /// Bootstrap resamples for the confidence intervals of grounding and mau; 0 disables the intervals.
    #[arg(long, default_value_t = Bootstrap::default().resamples)]
    resamples: usize,
    /// Seed of the bootstrap.
    #[arg(long, default_value_t = Bootstrap::default().seed)]
    seed: u64,
}

/// Metrics suite chosen on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SuiteChoice {
    Summary,
    Suite(Suite),
}

fn parse_suite(name: &str) -> Result<SuiteChoice, String> {
    let suite = Suite::ALL.into_iter().find(|s| s.name() == name).map(SuiteChoice::Suite);
    let known = || Suite::ALL.map(Suite::name).join(", ");
    suite
        .or_else(|| (name == "summary").then_some(SuiteChoice::Summary))
        .ok_or_else(|| format!("unknown suite `{name}`: use summary, {}", known()))
}

#[derive(Args)]
pub(crate) struct ReportArgs {
    /// Run directory.
    #[arg(required_unless_present = "responses")]
    run: Option<PathBuf>,
    /// Number of held-out images to show.
    #[arg(long, default_value_t = 8)]
    images: usize,
    /// Number of responses on samples.html, rounded to whole steps; 0 shows all.
    #[arg(long, default_value_t = SAMPLE_PAGE_RESPONSES)]
    samples: usize,
    /// File of responses to show with their rewards, instead of a run.
    #[arg(long, conflicts_with = "run", requires = "scores", requires = "out")]
    responses: Option<PathBuf>,
    /// Output of `unveil reward score --data RESPONSES`.
    #[arg(long, requires = "responses")]
    scores: Option<PathBuf>,
    /// HTML page to write.
    #[arg(long, requires = "responses")]
    out: Option<PathBuf>,
    /// Box form of the answers; defaults to `model.boxes`.
    #[arg(long)]
    boxes: Option<BoxForm>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// Default number of responses on the sample page of a run.
pub(crate) const SAMPLE_PAGE_RESPONSES: usize = 1000;

/// Loads a configuration with the box form from the command line.
fn load_config(config: &ConfigArgs, boxes: Option<BoxForm>) -> anyhow::Result<Config> {
    let mut config = config.clone();
    config.sets.extend(boxes.map(|form| format!("model.boxes=\"{form}\"")));
    Ok(config.load()?)
}

/// Runs `unveil eval`.
pub(crate) fn eval(args: &EvalArgs) -> anyhow::Result<()> {
    let config = load_config(&args.role.config, args.boxes)?;
    if args.role.supervised {
        unveil_cli::exit_with_supervisor();
    }
    let (evaluation, withheld, left_out) = match (&args.responses, &args.model, &args.data) {
        (Some(file), ..) => (Evaluation::new(evaluate_responses(&config, file, &args.split)?), None, 0),
        (None, Some(model), Some(data)) => evaluate_model(&config, model, data, args)?,
        _ => anyhow::bail!("give --model and --data, or --responses"),
    };
    if let Some(path) = &args.predictions {
        let lines = evaluation.answers.iter().map(|j| serde_json::to_string(&j.prediction));
        let lines = lines.collect::<Result<Vec<String>, _>>()?;
        unveil_core::write_atomic(path, (lines.join("\n") + "\n").as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let (table, results) = match args.suite {
        SuiteChoice::Summary => (evaluation.metrics.table(), serde_json::to_string(&evaluation.metrics)?),
        SuiteChoice::Suite(suite) => {
            let bootstrap = Bootstrap { resamples: args.resamples, seed: args.seed, ..Default::default() };
            let results = measure_suite(suite, &evaluation.answers, withheld.as_deref(), &bootstrap)?;
            (results.table(), serde_json::to_string(&results)?)
        }
    };
    if args.table {
        stderr_line(table.trim_end());
    }
    println!("{results}");
    if left_out > 0 {
        anyhow::bail!("{left_out} records could not be used and are not part of the metrics");
    }
    Ok(())
}

/// Evaluates the greedy answers of a model. Returns the evaluation, the answers to black images if the suite needs them, and the number of
/// unusable records, each of which is reported on stderr.
fn evaluate_model(
    config: &Config,
    model: &Path,
    data: &Path,
    args: &EvalArgs,
) -> anyhow::Result<(Evaluation, Option<Vec<EvaluatedAnswer>>, usize)> {
    require_model_dir("--model", model)?;
    let preprocessor = Preprocessor::load_with(model, &config.input_settings())?;
    let mut left_out: Vec<EvalError> = Vec::new();
    let records =
        RecordFile::load_lenient(data, PathPolicy::new(config.data.outside), |e| left_out.push(EvalError::Records(e)))?;
    let (mut samples, unusable) = load_usable_samples(&records, &args.split, &preprocessor)?;
    left_out.extend(unusable);
    if let SuiteChoice::Suite(suite) = args.suite {
        let grounding_samples = samples.iter().filter(|s| !s.record.is_text());
        check_suite(suite, grounding_samples.map(|s| (s.record.id.as_str(), s.record.source.as_str())))?;
    }
    let mut engine = open_engine(config, model, config.run.threads, preprocessor.tokenizer().banned())?;
    samples.retain(|s| match engine.check_input(&s.input, config.rollout.max_new_tokens) {
        Ok(_) => true,
        Err(e) => {
            left_out.push(e.into());
            false
        }
    });
    for reason in &left_out {
        stderr_line(&format!("left out: {}", redact(&reason.to_string())));
    }
    if let (true, Some(first)) = (samples.is_empty(), left_out.first()) {
        anyhow::bail!("no record can be used; the first problem: {first}");
    }
    let settings = EvalSettings {
        max_new_tokens: config.rollout.max_new_tokens,
        batch: config.eval.batch,
        scoring: Scoring::new(config),
    };
    let evaluation = evaluate(&mut engine, &preprocessor, &samples, &settings)?;
    let withheld = match args.suite {
        SuiteChoice::Suite(Suite::Grounding) => {
            Some(evaluate_withheld(&mut engine, &preprocessor, &samples, &settings)?.answers)
        }
        _ => None,
    };
    Ok((evaluation, withheld, left_out.len()))
}

/// Returns the image directories of a run, from the configuration in its directory.
fn image_folders(run: &Path) -> ImageFolders {
    let config = std::fs::read_to_string(run.join("config.toml")).ok();
    config
        .and_then(|text| unveil_config::parse("config.toml", &text).ok())
        .map_or_else(ImageFolders::default, |c| run_images(&c))
}

/// Returns the image directories of the records of a configuration.
pub(crate) fn run_images(config: &Config) -> ImageFolders {
    let records = config.records();
    let folder = records.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    ImageFolders::new(folder).allow_anywhere(config.data.outside)
}

/// Runs `unveil report`.
pub(crate) fn report(args: &ReportArgs) -> anyhow::Result<()> {
    let path = match (&args.run, &args.responses, &args.scores, &args.out) {
        (Some(run), ..) => unveil_report::write_report(run, args.images, args.samples, &image_folders(run))?,
        (None, Some(responses), Some(scores), Some(out)) => {
            let config = load_config(&args.config, args.boxes)?;
            let samples = rewarded_responses(&config, responses, scores)?;
            let title = responses.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            let folder = responses.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let images = ImageFolders::new([folder]).allow_anywhere(config.data.outside);
            unveil_report::write_samples(&title, &samples, Path::new(""), &images, out)?;
            out.clone()
        }
        _ => anyhow::bail!("give a run directory, or --responses with --scores and --out"),
    };
    println!("{}", json!({ "report": path }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_suites_list_the_known_ones() {
        assert_eq!(parse_suite("summary"), Ok(SuiteChoice::Summary));
        assert_eq!(parse_suite("mau"), Ok(SuiteChoice::Suite(Suite::Mau)));
        let e = parse_suite("pope").unwrap_err();
        assert!(["pope", "summary", "grounding", "mau"].iter().all(|n| e.contains(n)), "{e}");
    }
}
