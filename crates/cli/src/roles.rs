//! Roles: the supervisor and what it starts.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, bail};
use unveil_cli::{ConfigArgs, RoleArgs, Stop, run_role, telemetry};
use unveil_config::schema::Suite;
use unveil_config::{Config, ConfigError, Stage as Training};
use unveil_core::tell;
use unveil_data::prepare::Preparer;
use unveil_data::records::RecordFile;
use unveil_data::root::Reach;
use unveil_engine::Engine;
use unveil_eval::{Bootstrap, Settings, check, evaluate, evaluate_withheld, load_samples, measure};
use unveil_launch::{LaunchError, Options};
use unveil_learner::{
    Dataset, Evaluation, EventSink, Outcome, Progress, Ready, Silent, Stage, check_records, limits, run_rl,
};
use unveil_model::{Vlm, VlmConfig};
use unveil_report::{EventLog, StageProgress};
use unveil_reward::Scoring;
use unveil_rollout::{WorkerOptions, engine_options};
use unveil_service::{Health, announce};

use crate::before;
use crate::evaluation::{SAMPLES, run_images};

fn sibling(name: &str) -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("cannot find this program's own path")?;
    let path = me.with_file_name(name);
    if !path.exists() {
        bail!("{} is missing: build it with `cargo build --bins`, or copy it beside {}", path.display(), me.display());
    }
    Ok(path)
}

/// `unveil train`; with `prepare` only what comes before stage 2.
pub fn train(args: &ConfigArgs, prepare: bool) -> anyhow::Result<()> {
    let loaded = args.loaded()?;
    let config = loaded.config.clone();
    let rank = config.learner.parallel.rank;
    if rank > 0 {
        let what = format!(
            "learner.parallel.rank is {rank}: `unveil train` starts all ranks by itself; use `unveil learner` for one"
        );
        return Err(ConfigError::Invalid(vec![what]).into());
    }
    only_listeners_of_one(&config)?;
    before::all(&loaded, &Training::ALL)?;
    let _tracing = telemetry(&config, "train", "info")?;
    let (unveil, unveil_reward) = (sibling("unveil")?, sibling("unveil-reward")?);
    let summary = run_role(false, 1, |token| async move {
        let note = |line: &str| _ = tell(line);
        let stop = || token.is_cancelled();
        let options = Options { unveil, unveil_reward, stop: &stop, note: &note, prepare };
        let summary = tokio::task::block_in_place(|| unveil_launch::train(&config, &options)).map_err(|e| match e {
            LaunchError::Interrupted => anyhow::Error::new(Stop::Interrupted).context(e.to_string()),
            e => e.into(),
        })?;
        if summary.is_some() {
            let page = unveil_report::write_report(
                &config.run_dir(),
                config.eval.report_images,
                SAMPLES,
                &run_images(&config),
            )?;
            tell(&format!("report: {}", page.display()));
        }
        Ok(summary)
    })?;
    if let Some(summary) = summary {
        println!("{summary}");
    }
    Ok(())
}

/// `train` starts several processes with one configuration: a port of its own for each of them cannot be in it.
fn only_listeners_of_one(config: &Config) -> Result<(), ConfigError> {
    let fixed = |listen: &str| !listen.is_empty() && !listen.ends_with(":0");
    let mut faults = Vec::new();
    if fixed(&config.health.listen) {
        let what = "every role that `unveil train` starts would listen there: leave it empty, or use port 0";
        faults.push(format!("health.listen is `{}`: {what}", config.health.listen));
    }
    let (listen, workers) = (&config.rollout.metrics_listen, config.rollout.workers);
    if workers > 1 && fixed(listen) {
        let what = "each would listen there: leave it empty, or use port 0";
        faults
            .push(format!("rollout.metrics_listen is `{listen}` and `unveil train` starts {workers} workers: {what}"));
    }
    if faults.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(faults)) }
}

/// `unveil reward …`: becomes `unveil-reward …`.
pub fn reward(args: &[String]) -> anyhow::Result<()> {
    let error = Command::new(sibling("unveil-reward")?).args(args).exec();
    Err(error).context("cannot start unveil-reward")
}

/// `unveil sft`
pub fn sft(args: &RoleArgs) -> anyhow::Result<()> {
    let loaded = args.config.loaded()?;
    let config = loaded.config.clone();
    let _tracing = telemetry(&config, "sft", "warn")?;
    let paths = (config.initial_model(), config.stage1_model());
    before::role(&loaded, &paths.0, true)?;
    before::rates(&loaded, &[Training::Sft])?;
    let progress = StageProgress::new("stage 1", config.sft.steps, "images");
    stage(args.supervised, "sft", &config, paths, progress, |stage, health| {
        health.ready();
        unveil_learner::run_sft(stage)
    })
}

/// `unveil learner`
pub fn learner(args: &RoleArgs) -> anyhow::Result<()> {
    let loaded = args.config.loaded()?;
    let config = loaded.config.clone();
    let _tracing = telemetry(&config, "learner", "warn")?;
    let paths = (config.stage1_model(), config.final_model());
    before::role(&loaded, &paths.0, true)?;
    before::rates(&loaded, &[Training::Learner])?;
    let progress = StageProgress::new("stage 2", config.learner.steps, "responses");
    stage(args.supervised, "learner", &config, paths, progress, |stage, health| {
        run_rl(stage, |ready| {
            let (role, address) = match ready {
                Ready::Ranks(address) => ("rendezvous", address),
                Ready::Experience(address) => {
                    health.ready();
                    ("learner", address)
                }
                Ready::Joined => return health.ready(),
            };
            if let Err(e) = announce(role, address) {
                tell(&format!("the ready line could not be written: {e}"));
            }
        })
    })
}

/// The records of a run.
fn records(config: &Config) -> Result<RecordFile, unveil_data::records::RecordsError> {
    RecordFile::load_with(&config.records(), Reach::new(config.data.outside))
}

/// Runs one training stage on a thread of its own, which owns the model.
fn stage(
    supervised: bool,
    role: &str,
    config: &Config,
    (model_dir, out): (PathBuf, PathBuf),
    progress: StageProgress,
    run: impl FnOnce(Stage<'_>, &Health) -> unveil_learner::Result<Outcome> + Send,
) -> anyhow::Result<()> {
    let outcome = run_role(supervised, 1, |cancel| async move {
        let (health, _) = Health::start(&config.health.listen, cancel.clone()).await?;
        let work = || -> anyhow::Result<Outcome> {
            let preparer = Arc::new(Preparer::load_with(&model_dir, config.model.boxes)?);
            let context = context(&model_dir)?;
            let records = records(config)?;
            if config.learner.parallel.rank == 0 {
                check_records(config, &records, &preparer, context, &cancel)?;
            }
            if cancel.is_cancelled() {
                return Ok(Outcome { interrupted: true, ..Outcome::default() });
            }
            let mut evaluator = validation(config, &model_dir)?;
            // Only rank 0 has something to tell.
            let (mut nobody, mut silent) = (Vec::new(), Silent);
            let mut shown = (config.learner.parallel.rank == 0)
                .then(|| Ok::<_, anyhow::Error>((EventLog::open(&config.run_dir(), role)?, progress)))
                .transpose()?;
            let (events, progress): (&mut dyn EventSink, &mut dyn Progress) = match &mut shown {
                Some((events, progress)) => (events, progress),
                None => (&mut nobody, &mut silent),
            };
            let stage = Stage {
                config,
                model_dir: &model_dir,
                out: &out,
                data: Arc::new(Dataset::new(config, records, preparer)?.within(limits(config, context))),
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
    if outcome.interrupted { Err(Stop::of_role(supervised).into()) } else { Ok(()) }
}

/// Tokens that the model of a directory takes in all.
pub fn context(model_dir: &Path) -> anyhow::Result<usize> {
    Ok(VlmConfig::load(model_dir)?.text.max_position_embeddings.max(0) as usize)
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Held-out evaluation on the validation split, for use during training.
fn validation(
    config: &Config,
    model_dir: &Path,
) -> anyhow::Result<impl FnMut(&mut Vlm, u64) -> Result<Evaluation, Failure>> {
    let preparer = Preparer::load_with(model_dir, config.model.boxes)?;
    let (data, eval) = (&config.data, &config.eval);
    let samples = load_samples(&records(config)?, &data.val_split, eval.val_limit, &data.question, &preparer)?;
    let settings =
        Settings { max_new_tokens: config.rollout.max_new_tokens, batch: eval.batch, scoring: Scoring::new(config) };
    for suite in &eval.suites {
        let of_regions = samples.iter().filter(|s| !s.record.is_text());
        check(*suite, of_regions.map(|s| (s.record.id.as_str(), s.record.source.as_str())))?;
    }
    let config = config.clone();
    Ok(move |vlm: &mut Vlm, _step: u64| {
        let options = engine_options(&config, vlm.config(), &preparer.tokenizer().special().banned);
        let mut engine = Engine::new(&*vlm, options)?;
        let found = evaluate(&mut engine, &preparer, &samples, &settings)?;
        let score = (found.metrics.mean_iou + found.metrics.soft_f1) / 2.0;
        let mut metrics = serde_json::to_value(found.metrics)?.as_object().cloned().unwrap_or_default();
        let withheld = match config.eval.suites.contains(&Suite::Grounding) {
            true => Some(evaluate_withheld(&mut engine, &preparer, &samples, &settings)?.judged),
            false => None,
        };
        let no_intervals = Bootstrap { resamples: 0, ..Default::default() };
        for suite in &config.eval.suites {
            let values = measure(*suite, &found.judged, withheld.as_deref(), &no_intervals)?.values();
            metrics.insert(suite.name().to_owned(), values.into());
        }
        Ok(Evaluation { metrics, score })
    })
}

/// `unveil rollout`
pub fn rollout(args: &RoleArgs, worker: String) -> anyhow::Result<()> {
    let loaded = args.config.loaded()?;
    let config = loaded.config.clone();
    let _tracing = telemetry(&config, "rollout", "info")?;
    for (key, address) in [("learner.address", &config.learner.address), ("reward.address", &config.reward.address)] {
        if address.is_empty() {
            bail!("a rollout worker needs {key} (http://host:port)");
        }
    }
    before::role(&loaded, &config.stage1_model(), false)?;
    let (model, experience, reward) =
        (config.stage1_model(), config.learner.address.clone(), config.reward.address.clone());
    let mut options = WorkerOptions::new(config, model, experience, reward, worker);
    let report = run_role(args.supervised, 1, |token| async move {
        (options.health, _) = Health::start(&options.config.health.listen, token.clone()).await?;
        Ok(unveil_rollout::run(options, token).await?)
    })?;
    if report.finished { Ok(()) } else { Err(Stop::of_role(args.supervised).into()) }
}
