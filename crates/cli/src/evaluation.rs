//! `unveil eval` and `unveil report`: answers measured, and shown.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::json;
use unveil_cli::{ConfigArgs, RoleArgs};
use unveil_config::Config;
use unveil_config::schema::Suite;
use unveil_core::{BoxForm, redact, tell};
use unveil_data::prepare::Preparer;
use unveil_data::records::RecordFile;
use unveil_data::root::Reach;
use unveil_eval::{
    Bootstrap, EvalError, Evaluation, Judged, Settings, check, evaluate, evaluate_withheld, judge_responses,
    load_usable, measure, shown_responses,
};
use unveil_report::ImageFolders;
use unveil_reward::Scoring;
use unveil_rollout::open_engine;

use crate::before::model_directory;

#[derive(Args)]
pub struct EvalArgs {
    #[command(flatten)]
    role: RoleArgs,
    /// Model directory.
    #[arg(long, required_unless_present = "responses")]
    model: Option<PathBuf>,
    /// Record file.
    #[arg(long, required_unless_present = "responses")]
    data: Option<PathBuf>,
    /// Instead of a model and records: a file of responses, of any model.
    #[arg(long, conflicts_with_all = ["model", "data"])]
    responses: Option<PathBuf>,
    /// How boxes are written in answers: absolute, per_mille, qwen2_vl or llava; as `model.boxes` says without it.
    #[arg(long)]
    boxes: Option<BoxForm>,
    /// Only this split.
    #[arg(long, default_value = "", hide_default_value = true)]
    split: String,
    /// Metrics suite: summary, grounding or mau.
    #[arg(long, default_value = "summary", value_parser = suite_named)]
    suite: Chosen,
    /// Also writes one prediction per line here.
    #[arg(long)]
    predictions: Option<PathBuf>,
    /// Also prints a table on stderr.
    #[arg(long)]
    table: bool,
    /// Resamples behind the intervals of grounding and mau; 0 = no intervals.
    #[arg(long, default_value_t = Bootstrap::default().resamples)]
    resamples: usize,
    /// Seed of the resamples.
    #[arg(long, default_value_t = Bootstrap::default().seed)]
    seed: u64,
}

/// The summary, or a suite beyond it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chosen {
    Summary,
    Beyond(Suite),
}

fn suite_named(name: &str) -> Result<Chosen, String> {
    let beyond = Suite::ALL.into_iter().find(|s| s.name() == name).map(Chosen::Beyond);
    let there = || Suite::ALL.map(Suite::name).join(", ");
    beyond
        .or_else(|| (name == "summary").then_some(Chosen::Summary))
        .ok_or_else(|| format!("no suite `{name}`; there are: summary, {}", there()))
}

#[derive(Args)]
pub struct ReportArgs {
    /// The run directory.
    #[arg(required_unless_present = "responses")]
    run: Option<PathBuf>,
    /// Held-out images shown.
    #[arg(long, default_value_t = 8)]
    images: usize,
    /// Responses of the run shown on samples.html, by whole steps; 0 = all.
    #[arg(long, default_value_t = SAMPLES)]
    samples: usize,
    /// Instead of a run: a file of responses, shown with their rewards.
    #[arg(long, conflicts_with = "run", requires = "scores", requires = "out")]
    responses: Option<PathBuf>,
    /// What `unveil reward score --data RESPONSES` printed.
    #[arg(long, requires = "responses")]
    scores: Option<PathBuf>,
    /// Page to write.
    #[arg(long, requires = "responses")]
    out: Option<PathBuf>,
    /// How boxes are written in answers; as `model.boxes` says without it.
    #[arg(long)]
    boxes: Option<BoxForm>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// Responses on a run's sample page.
pub const SAMPLES: usize = 1000;

fn load(config: &ConfigArgs, boxes: Option<BoxForm>) -> anyhow::Result<Config> {
    let mut config = config.clone();
    config.sets.extend(boxes.map(|form| format!("model.boxes=\"{form}\"")));
    Ok(config.load()?)
}

/// `unveil eval`
pub fn eval(args: &EvalArgs) -> anyhow::Result<()> {
    let config = load(&args.role.config, args.boxes)?;
    if args.role.supervised {
        unveil_cli::end_with_supervisor();
    }
    let (evaluation, withheld, left_out) = match (&args.responses, &args.model, &args.data) {
        (Some(file), ..) => (Evaluation::new(judge_responses(&config, file, &args.split)?), None, 0),
        (None, Some(model), Some(data)) => answers(&config, model, data, args)?,
        _ => anyhow::bail!("give --model and --data, or --responses"),
    };
    if let Some(path) = &args.predictions {
        let lines = evaluation.judged.iter().map(|j| serde_json::to_string(&j.prediction));
        let lines = lines.collect::<Result<Vec<String>, _>>()?;
        unveil_core::write_atomic(path, (lines.join("\n") + "\n").as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let (table, found) = match args.suite {
        Chosen::Summary => (evaluation.metrics.table(), serde_json::to_string(&evaluation.metrics)?),
        Chosen::Beyond(suite) => {
            let bootstrap = Bootstrap { resamples: args.resamples, seed: args.seed, ..Default::default() };
            let found = measure(suite, &evaluation.judged, withheld.as_deref(), &bootstrap)?;
            (found.table(), serde_json::to_string(&found)?)
        }
    };
    if args.table {
        tell(table.trim_end());
    }
    println!("{found}");
    if left_out > 0 {
        anyhow::bail!("{left_out} records could not be used: the metrics are those of the others");
    }
    Ok(())
}

/// Greedy answers of a model, those to black images where the suite asks for them, and how many records were left out: each is named
/// on stderr.
fn answers(
    config: &Config,
    model: &Path,
    data: &Path,
    args: &EvalArgs,
) -> anyhow::Result<(Evaluation, Option<Vec<Judged>>, usize)> {
    model_directory("--model", model)?;
    let preparer = Preparer::load_with(model, config.model.boxes)?;
    let mut left_out: Vec<EvalError> = Vec::new();
    let records =
        RecordFile::load_some(data, Reach::new(config.data.outside), |e| left_out.push(EvalError::Records(e)))?;
    let (mut samples, unusable) = load_usable(&records, &args.split, &config.data.question, &preparer)?;
    left_out.extend(unusable);
    if let Chosen::Beyond(suite) = args.suite {
        let of_regions = samples.iter().filter(|s| !s.record.is_text());
        check(suite, of_regions.map(|s| (s.record.id.as_str(), s.record.source.as_str())))?;
    }
    let mut engine = open_engine(config, model, config.run.threads, &preparer.tokenizer().special().banned)?;
    samples.retain(|s| match engine.check(&s.input, config.rollout.max_new_tokens) {
        Ok(_) => true,
        Err(e) => {
            left_out.push(e.into());
            false
        }
    });
    for why in &left_out {
        tell(&format!("left out: {}", redact(&why.to_string())));
    }
    if let (true, Some(first)) = (samples.is_empty(), left_out.first()) {
        anyhow::bail!("no record can be used, the first: {first}");
    }
    let settings = Settings {
        max_new_tokens: config.rollout.max_new_tokens,
        batch: config.eval.batch,
        scoring: Scoring::new(config),
    };
    let evaluation = evaluate(&mut engine, &preparer, &samples, &settings)?;
    let withheld = match args.suite {
        Chosen::Beyond(Suite::Grounding) => {
            Some(evaluate_withheld(&mut engine, &preparer, &samples, &settings)?.judged)
        }
        _ => None,
    };
    Ok((evaluation, withheld, left_out.len()))
}

/// Where a run's images lie, by the configuration that it has kept.
fn image_folders(run: &Path) -> ImageFolders {
    let kept = std::fs::read_to_string(run.join("config.toml")).ok();
    kept.and_then(|text| unveil_config::read("config.toml", &text).ok())
        .map_or_else(ImageFolders::default, |c| run_images(&c))
}

/// Where the images of a configuration's records lie.
pub fn run_images(config: &Config) -> ImageFolders {
    let records = config.records();
    let folder = records.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    ImageFolders::new(folder).anywhere(config.data.outside)
}

/// `unveil report`
pub fn report(args: &ReportArgs) -> anyhow::Result<()> {
    let path = match (&args.run, &args.responses, &args.scores, &args.out) {
        (Some(run), ..) => unveil_report::write_report(run, args.images, args.samples, &image_folders(run))?,
        (None, Some(responses), Some(scores), Some(out)) => {
            let config = load(&args.config, args.boxes)?;
            let shown = shown_responses(&config, responses, scores)?;
            let title = responses.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            let folder = responses.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let images = ImageFolders::new([folder]).anywhere(config.data.outside);
            unveil_report::write_samples(&title, &shown, Path::new(""), &images, out)?;
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
    fn a_wrong_suite_lists_the_names() {
        assert_eq!(suite_named("summary"), Ok(Chosen::Summary));
        assert_eq!(suite_named("mau"), Ok(Chosen::Beyond(Suite::Mau)));
        let e = suite_named("pope").unwrap_err();
        assert!(["pope", "summary", "grounding", "mau"].iter().all(|n| e.contains(n)), "{e}");
    }
}
