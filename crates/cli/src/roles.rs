//! Roles: the supervisor and the processes that it starts.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, bail};
use unveil_cli::{ConfigArgs, RoleArgs, Stop, init_telemetry, run_role};
use unveil_config::schema::Suite;
use unveil_config::{Config, ConfigError, TrainingStage};
use unveil_core::stderr_line;
use unveil_data::image_root::PathPolicy;
use unveil_data::records::RecordFile;
use unveil_engine::Engine;
use unveil_eval::{Bootstrap, EvalSettings, check_suite, evaluate, evaluate_withheld, load_samples, measure_suite};
use unveil_launch::{LaunchError, TrainOptions};
use unveil_learner::{
    Dataset, EvaluatorError, EventSink, Outcome, Progress, Ready, SilentProgress, Stage, ValidationResult,
    check_records, run_rl, training_limits,
};
use unveil_model::{Vlm, VlmConfig};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_report::{EventLog, StageProgress};
use unveil_reward::Scoring;
use unveil_rollout::{WorkerOptions, engine_options};
use unveil_service::{Health, announce};

use crate::evaluation::{SAMPLE_PAGE_RESPONSES, run_images};
use crate::{planning, preflight};

/// Returns the path of a binary next to this one.
fn sibling_binary(name: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("cannot determine the path of this program")?;
    let path = program.with_file_name(name);
    if !path.exists() {
        bail!(
            "{} is missing: build it with `cargo build --bins`, or copy it next to {}",
            path.display(),
            program.display()
        );
    }
    Ok(path)
}

/// Runs `unveil train`; with `prepare` only the part before stage 2, with `dry_run` nothing.
pub(crate) fn train(args: &ConfigArgs, prepare: bool, dry_run: bool) -> anyhow::Result<()> {
    let loaded = args.load_with_origins()?;
    let config = loaded.config.clone();
    for (section, role, parallel) in
        [("sft", "sft", &config.sft.parallel), ("learner", "learner", &config.learner.parallel)]
    {
        let rank = parallel.rank;
        if rank > 0 {
            let message = format!(
                "{section}.parallel.rank is {rank}: `unveil train` starts all ranks itself; use `unveil {role}` for a single rank"
            );
            return Err(ConfigError::Invalid(vec![message]).into());
        }
    }
    check_shared_listeners(&config)?;
    preflight::check_all(&loaded, &TrainingStage::ALL)?;
    if dry_run {
        return planning::dry_run(&loaded);
    }
    planning::check_memory(&loaded, prepare)?;
    let _tracing = init_telemetry(&config, "train", "info")?;
    let unveil = sibling_binary("unveil")?;
    let unveil_reward = sibling_binary("unveil-reward")?;
    let summary = run_role(false, 1, |token| async move {
        let note = |line: &str| _ = stderr_line(line);
        let stop = || token.is_cancelled();
        let options = TrainOptions { unveil, unveil_reward, stop: &stop, note: &note, prepare };
        let summary = tokio::task::block_in_place(|| unveil_launch::train(&config, &options)).map_err(|e| match e {
            LaunchError::Interrupted => anyhow::Error::new(Stop::Interrupted).context(e.to_string()),
            e => e.into(),
        })?;
        if summary.is_some() {
            let page = unveil_report::write_report(
                &config.run_dir(),
                config.eval.report_images,
                SAMPLE_PAGE_RESPONSES,
                &run_images(&config),
            )?;
            stderr_line(&format!("report: {}", page.display()));
        }
        Ok(summary)
    })?;
    if let Some(summary) = summary {
        println!("{summary}");
    }
    Ok(())
}

/// Refuses fixed ports that several processes of `train` would share, since all have the same configuration.
fn check_shared_listeners(config: &Config) -> Result<(), ConfigError> {
    let fixed = |listen: &str| !listen.is_empty() && !listen.ends_with(":0");
    let mut problems = Vec::new();
    if fixed(&config.health.listen) {
        let advice = "every role that `unveil train` starts would listen there: leave it empty, or use port 0";
        problems.push(format!("health.listen is `{}`: {advice}", config.health.listen));
    }
    let listen = &config.rollout.metrics_listen;
    let workers = config.rollout.workers;
    if workers > 1 && fixed(listen) {
        let advice = "each would listen there: leave it empty, or use port 0";
        problems.push(format!(
            "rollout.metrics_listen is `{listen}` and `unveil train` starts {workers} workers: {advice}"
        ));
    }
    if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(problems)) }
}

/// Runs `unveil reward …`: replaces this process by `unveil-reward …`.
pub(crate) fn reward(args: &[String]) -> anyhow::Result<()> {
    let error = Command::new(sibling_binary("unveil-reward")?).args(args).exec();
    Err(error).context("cannot start unveil-reward")
}

/// Runs `unveil sft`.
pub(crate) fn sft(args: &RoleArgs) -> anyhow::Result<()> {
    let loaded = args.config.load_with_origins()?;
    let config = loaded.config.clone();
    let _tracing = init_telemetry(&config, "sft", "warn")?;
    let paths = (config.initial_model(), config.stage1_model());
    preflight::check_role_inputs(&loaded, &paths.0, true)?;
    preflight::check_learning_rates(&loaded, &[TrainingStage::Sft])?;
    let progress = StageProgress::new("stage 1", config.sft.steps, "images");
    let rank = config.sft.parallel.rank;
    run_stage(args.supervised, ("sft", rank), &config, paths, progress, |stage, health| {
        health.set_ready();
        unveil_learner::run_sft(stage, |ready| announce_ready(ready, health))
    })
}

/// Runs `unveil learner`.
pub(crate) fn learner(args: &RoleArgs) -> anyhow::Result<()> {
    let loaded = args.config.load_with_origins()?;
    let config = loaded.config.clone();
    let _tracing = init_telemetry(&config, "learner", "warn")?;
    let paths = (config.stage2_base(), config.final_model());
    preflight::check_role_inputs(&loaded, &paths.0, true)?;
    preflight::check_learning_rates(&loaded, &[TrainingStage::Learner])?;
    let progress = StageProgress::new("stage 2", config.learner.steps, "responses");
    let rank = config.learner.parallel.rank;
    run_stage(args.supervised, ("learner", rank), &config, paths, progress, |stage, health| {
        run_rl(stage, |ready| announce_ready(ready, health))
    })
}

/// Tells the supervisor and probes that a milestone of the start-up has been reached.
fn announce_ready(ready: Ready, health: &Health) {
    let (role, address) = match ready {
        Ready::Ranks(address) => ("rendezvous", address),
        Ready::Experience(address) => {
            health.set_ready();
            ("learner", address)
        }
        Ready::Joined => return health.set_ready(),
    };
    if let Err(e) = announce(role, address) {
        stderr_line(&format!("cannot write the ready line: {e}"));
    }
}

/// Loads the records of a run.
fn load_records(config: &Config) -> Result<RecordFile, unveil_data::records::RecordsError> {
    RecordFile::load_with(&config.records(), PathPolicy::new(config.data.outside))
}

/// Runs one training stage on a separate thread, which owns the model.
fn run_stage(
    supervised: bool,
    (role, rank): (&str, usize),
    config: &Config,
    (model_dir, out): (PathBuf, PathBuf),
    progress: StageProgress,
    run: impl FnOnce(Stage<'_>, &Health) -> unveil_learner::Result<Outcome> + Send,
) -> anyhow::Result<()> {
    let outcome = run_role(supervised, 1, |cancel| async move {
        let (health, _) = Health::start(&config.health.listen, cancel.clone()).await?;
        let work = || -> anyhow::Result<Outcome> {
            let preprocessor = Arc::new(Preprocessor::load_with(&model_dir, &config.input_settings())?);
            let context = context_length(&model_dir)?;
            let records = load_records(config)?;
            if rank == 0 {
                check_records(config, &records, &preprocessor, context, &cancel)?;
            }
            if cancel.is_cancelled() {
                return Ok(Outcome { interrupted: true, ..Outcome::default() });
            }
            let mut evaluator = validation_evaluator(config, &model_dir)?;
            // Only rank 0 reports events and progress.
            let mut discarded = Vec::new();
            let mut silent = SilentProgress;
            let mut shown = (rank == 0)
                .then(|| Ok::<_, anyhow::Error>((EventLog::open(&config.run_dir(), role)?, progress)))
                .transpose()?;
            let (events, progress): (&mut dyn EventSink, &mut dyn Progress) = match &mut shown {
                Some((events, progress)) => (events, progress),
                None => (&mut discarded, &mut silent),
            };
            let stage = Stage {
                config,
                model_dir: &model_dir,
                out: &out,
                data: Arc::new(
                    Dataset::new(config, records, preprocessor)?.with_limits(training_limits(config, context)),
                ),
                environment: unveil_config::environment(),
                cancel,
                events,
                progress,
                evaluator: Some(&mut evaluator),
            };
            Ok(run(stage, &health)?)
        };
        tokio::task::block_in_place(|| {
            std::thread::scope(|s| s.spawn(work).join().map_err(|_| anyhow::anyhow!("the {role} thread panicked")))
        })?
    })?;
    if outcome.interrupted { Err(Stop::for_role(supervised).into()) } else { Ok(()) }
}

/// Returns the context length in tokens of the model in a directory.
pub(crate) fn context_length(model_dir: &Path) -> anyhow::Result<usize> {
    Ok(VlmConfig::load(model_dir)?.text.max_position_embeddings.max(0) as usize)
}

/// Returns the evaluation on the validation split for use during training.
fn validation_evaluator(
    config: &Config,
    model_dir: &Path,
) -> anyhow::Result<impl FnMut(&mut Vlm, u64) -> Result<ValidationResult, EvaluatorError>> {
    let preprocessor = Preprocessor::load_with(model_dir, &config.input_settings())?;
    let data = &config.data;
    let eval = &config.eval;
    let samples = load_samples(&load_records(config)?, &data.val_split, eval.val_limit, &preprocessor)?;
    let settings = EvalSettings {
        max_new_tokens: config.rollout.max_new_tokens,
        batch: eval.batch,
        scoring: Scoring::new(config),
    };
    for suite in &eval.suites {
        let grounding_samples = samples.iter().filter(|s| !s.record.is_text());
        check_suite(*suite, grounding_samples.map(|s| (s.record.id.as_str(), s.record.source.as_str())))?;
    }
    let config = config.clone();
    Ok(move |vlm: &mut Vlm, _step: u64| {
        let options = engine_options(&config, vlm.config(), preprocessor.tokenizer().banned());
        let mut engine = Engine::new(&*vlm, options)?;
        let evaluation = evaluate(&mut engine, &preprocessor, &samples, &settings)?;
        let mean = (evaluation.metrics.mean_iou + evaluation.metrics.soft_f1) / 2.0;
        let mut metrics = serde_json::to_value(evaluation.metrics)?.as_object().cloned().unwrap_or_default();
        let withheld = match config.eval.suites.contains(&Suite::Grounding) {
            true => Some(evaluate_withheld(&mut engine, &preprocessor, &samples, &settings)?.answers),
            false => None,
        };
        let no_intervals = Bootstrap { resamples: 0, ..Default::default() };
        for suite in &config.eval.suites {
            let values = measure_suite(*suite, &evaluation.answers, withheld.as_deref(), &no_intervals)?.values();
            metrics.insert(suite.name().to_owned(), values.into());
        }
        let score = if config.eval.best.is_empty() { mean } else { score_of(&metrics, &config.eval.best) };
        Ok(ValidationResult { metrics, score })
    })
}

/// Returns the metric with this name, `NAME` or `SUITE.NAME`, as a score. A metric without a value has none, and neither has one that the
/// suite does not know: then no checkpoint counts as better than another.
fn score_of(metrics: &serde_json::Map<String, serde_json::Value>, name: &str) -> f64 {
    let value = match name.split_once('.') {
        Some((suite, metric)) => metrics.get(suite).and_then(|values| values.get(metric)),
        None => metrics.get(name),
    };
    if value.is_none() {
        stderr_line(&format!("the validation has no metric `{name}` (eval.best), so no checkpoint counts as the best"));
    }
    value.and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN)
}

/// Runs `unveil rollout`.
pub(crate) fn rollout(args: &RoleArgs, worker: String) -> anyhow::Result<()> {
    let loaded = args.config.load_with_origins()?;
    let config = loaded.config.clone();
    let _tracing = init_telemetry(&config, "rollout", "info")?;
    for (key, address) in [("learner.address", &config.learner.address), ("reward.address", &config.reward.address)] {
        if address.is_empty() {
            bail!("a rollout worker needs {key} (http://host:port)");
        }
    }
    preflight::check_role_inputs(&loaded, &config.stage2_base(), false)?;
    let model = config.stage2_base();
    let experience = config.learner.address.clone();
    let reward = config.reward.address.clone();
    let mut options = WorkerOptions::new(config, model, experience, reward, worker);
    let report = run_role(args.supervised, 1, |token| async move {
        (options.health, _) = Health::start(&options.config.health.listen, token.clone()).await?;
        Ok(unveil_rollout::run(options, token).await?)
    })?;
    if report.finished { Ok(()) } else { Err(Stop::for_role(args.supervised).into()) }
}

#[cfg(test)]
mod tests {
    use super::score_of;

    #[test]
    fn scores_are_metrics_of_the_summary_or_of_a_suite() {
        let metrics = serde_json::json!({"mean_iou": 0.25, "n": 3, "grounding": {"acc50": 0.5, "gap": null}});
        let metrics = metrics.as_object().cloned().unwrap_or_default();
        assert_eq!((score_of(&metrics, "mean_iou"), score_of(&metrics, "grounding.acc50")), (0.25, 0.5));
        assert!(["grounding.gap", "grounding.none", "mau.accuracy"].iter().all(|n| score_of(&metrics, n).is_nan()));
    }
}
