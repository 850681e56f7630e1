//! `unveil train`: a whole run in one run directory, resumable at every point.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use unveil_config::Config;

use crate::gpus::{self, Gpus, Placement};
use crate::memory::PeakMemory;
use crate::role_process::{RoleCommand, RoleProcess};
use crate::stage1::Stage1;
use crate::stage2::Stage2;
use crate::{LaunchError, io, prepare_data};

/// Programs and callbacks of a run.
pub struct TrainOptions<'a> {
    /// The `unveil` binary.
    pub unveil: PathBuf,
    /// The torch-free `unveil-reward` binary.
    pub unveil_reward: PathBuf,
    /// True once the run was interrupted.
    pub stop: &'a dyn Fn() -> bool,
    /// Shows one line to the user.
    pub note: &'a dyn Fn(&str),
    /// Whether to end before stage 2, whose roles are started by something else.
    pub prepare: bool,
}

impl std::fmt::Debug for TrainOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainOptions")
            .field("unveil", &self.unveil)
            .field("prepare", &self.prepare)
            .finish_non_exhaustive()
    }
}

/// Runs both stages and returns the contents of `summary.json`; `None` if the run was only prepared.
///
/// # Errors
/// See [`LaunchError`]. Everything written before the error stays intact, and the same call resumes from it.
pub fn train(config: &Config, options: &TrainOptions<'_>) -> Result<Option<Value>, LaunchError> {
    let started = Instant::now();
    let (gpus, placement) = assign_gpus(config, options.prepare)?;
    let run = config.run_dir();
    let logs = run.join("logs");
    for dir in [&run, &logs, &run.join("eval")] {
        std::fs::create_dir_all(dir).map_err(io("cannot create", dir))?;
    }
    let _lock = lock(&run)?;
    let file = write_config(config, &run, options.note)?;
    let memory = PeakMemory::start();
    let job = TrainJob { config, options, run: &run, logs: &logs, file: &file, gpus: &gpus };
    let wall = WallClock::resume(&run, started);
    job.prepare()?;

    let initial = config.initial_model();
    if config.model.dir.is_empty() && !initial.join("config.json").exists() {
        let m = &config.model;
        let args = ["model", "init", "--family", &m.family, "--preset", &m.preset, "--out"].map(str::to_owned);
        let seed = ["--seed".to_owned(), config.run.seed.to_string()];
        job.run_to_end("model", args.into_iter().chain([initial.display().to_string()]).chain(seed).collect(), false)?;
    }
    if config.sft.steps > 0 && !config.stage1_model().join("config.json").exists() {
        job.run_stage_1()?;
    }
    let before = job.evaluate(&config.stage1_model(), "before")?;
    if options.prepare {
        return Ok(None);
    }
    if config.learner.steps > 0 && !config.final_model().join("config.json").exists() {
        if let Some(line) = placement.describe() {
            (options.note)(&line);
        }
        let stage2 = Stage2 {
            unveil: &options.unveil,
            unveil_reward: &options.unveil_reward,
            config: &file,
            logs: &logs,
            placement,
            reward_address: &config.reward.address,
            scheme: config.scheme(),
        };
        stage2.run(options.stop, options.note)?;
    }
    let after = if config.learner.steps > 0 { job.evaluate(&config.final_model(), "after")? } else { before.clone() };

    let mut summary = json!({
        "before": before,
        "after": after,
        "wall_s": wall.seconds(),
        "peak_rss_mib": memory.peak_mib(),
        "steps": config.learner.steps,
        "seed": config.run.seed,
    });
    let events = unveil_report::read_events(&run).map_err(io("cannot read", &run))?;
    add_sampling_counts(&mut summary, config, events);
    let path = run.join("summary.json");
    unveil_core::write_atomic(&path, format!("{summary:#}\n").as_bytes()).map_err(io("cannot write", &path))?;
    Ok(Some(summary))
}

/// Adds to the summary how many groups were replaced and how many responses left out of the loss, each if the configuration enables it.
fn add_sampling_counts(summary: &mut Value, config: &Config, events: Vec<Value>) {
    let updates = unveil_report::lineage(events);
    let sum =
        |key: &str| -> u64 { updates.iter().filter(|e| e["kind"] == "train").filter_map(|e| e[key].as_u64()).sum() };
    if config.learner.max_replaced > 0 {
        summary["replaced_groups"] = sum("replaced").into();
    }
    if config.learner.overlong_filter {
        summary["filtered_responses"] = sum("filtered_responses").into();
    }
}

/// Returns the GPUs of the run and their assignment in stage 2, before anything is written.
pub(crate) fn assign_gpus(config: &Config, prepare: bool) -> Result<(Gpus, Placement), LaunchError> {
    let visible = unveil_config::environment().into_iter().find(|(name, _)| name == gpus::VISIBLE_DEVICES);
    let gpus = Gpus::detect(&config.run.device, visible.as_ref().map(|(_, value)| value.as_str()))?;
    let mut ranks = config.learner.parallel.ranks;
    let mut workers = config.rollout.workers;
    if prepare || config.learner.steps == 0 {
        // Stage 2 does not run here.
        ranks = 0;
        workers = 0;
    }
    let placement = gpus.assign(ranks, workers, config.launch.share_gpus)?;
    Ok((gpus, placement))
}

/// A run and its directories.
struct TrainJob<'a> {
    config: &'a Config,
    options: &'a TrainOptions<'a>,
    run: &'a Path,
    logs: &'a Path,
    file: &'a Path,
    gpus: &'a Gpus,
}

impl TrainJob<'_> {
    /// Runs all ranks of stage 1.
    fn run_stage_1(&self) -> Result<(), LaunchError> {
        let ranks = self.gpus.assign_stage_1(self.config.sft.parallel.ranks, self.config.launch.share_gpus)?;
        let stage = Stage1 { unveil: &self.options.unveil, config: self.file, logs: self.logs, ranks };
        stage.run(self.options.stop)
    }

    /// Prepares the data on a separate thread, which an interrupt abandons: record files are written atomically.
    fn prepare(&self) -> Result<(), LaunchError> {
        let (tx, lines) = mpsc::channel();
        let config = self.config.clone();
        let work = std::thread::spawn(move || {
            prepare_data(&config, &|line| {
                let _receiver_may_be_dropped = tx.send(line.to_owned());
            })
        });
        loop {
            match lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => (self.options.note)(&line),
                Err(RecvTimeoutError::Timeout) if (self.options.stop)() => return Err(LaunchError::Interrupted),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        work.join().map_err(|_| LaunchError::Data("preparing the data failed: a thread panicked".into()))?
    }

    /// Runs a command of `unveil` to its end and returns its stdout lines.
    fn run_to_end(&self, name: &str, args: Vec<String>, shown: bool) -> Result<Vec<String>, LaunchError> {
        let log = self.logs.join(format!("{name}.log"));
        let program = &self.options.unveil;
        // Roles that run alone get the first GPU. `unveil model init` has no `--set` and uses no device.
        let gpu = self.gpus.first();
        let gpu = gpu.as_ref().filter(|_| name != "model");
        let mut role = RoleProcess::start(RoleCommand { name, program, args, log: &log, shown, gpu })?;
        loop {
            if let Some(status) = role.exit_status() {
                return if status.success() { Ok(role.output()) } else { Err(role.failure(status)) };
            }
            if (self.options.stop)() {
                role.terminate();
                role.reap(Instant::now() + Duration::from_secs(4));
                return Err(LaunchError::Interrupted);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns the metrics of a model on the held-out test split; they are kept in `eval/` and not computed twice.
    fn evaluate(&self, model: &Path, name: &str) -> Result<Value, LaunchError> {
        let result = self.run.join("eval").join(format!("{name}.json"));
        if let Some(metrics) = std::fs::read_to_string(&result).ok().and_then(|t| serde_json::from_str(&t).ok()) {
            return Ok(metrics);
        }
        (self.options.note)(&format!("evaluating the held-out images ({name} stage 2)"));
        let predictions = self.run.join("eval").join(format!("{name}.jsonl"));
        let args = [
            "eval".into(),
            "--supervised".into(),
            "--config".into(),
            self.file.display().to_string(),
            "--model".into(),
            model.display().to_string(),
            "--data".into(),
            self.config.records().display().to_string(),
            "--split".into(),
            self.config.data.test_split.clone(),
            "--suite".into(),
            "summary".into(),
            "--predictions".into(),
            predictions.display().to_string(),
        ];
        let lines = self.run_to_end("eval", args.to_vec(), false)?;
        let metrics: Value = lines.last().and_then(|l| serde_json::from_str(l).ok()).ok_or_else(|| {
            LaunchError::Data(format!("`unveil eval` printed no metrics; see {}", self.logs.display()))
        })?;
        unveil_core::write_atomic(&result, format!("{metrics}\n").as_bytes()).map_err(io("cannot write", &result))?;
        Ok(metrics)
    }
}

/// Seconds spent on this run over all its starts; saved in `wall_s`.
struct WallClock {
    path: PathBuf,
    earlier: f64,
    started: Instant,
}

impl WallClock {
    fn resume(run: &Path, started: Instant) -> Self {
        let path = run.join("wall_s");
        let earlier = std::fs::read_to_string(&path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0.0);
        Self { path, earlier, started }
    }

    fn seconds(&self) -> f64 {
        self.earlier + self.started.elapsed().as_secs_f64()
    }
}

impl Drop for WallClock {
    fn drop(&mut self) {
        let _best_effort = unveil_core::write_atomic(&self.path, format!("{:.1}\n", self.seconds()).as_bytes());
    }
}

fn lock(run: &Path) -> Result<std::fs::File, LaunchError> {
    let path = run.join(".lock");
    let file = std::fs::File::create(&path).map_err(io("cannot write", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(LaunchError::InUse(run.to_owned())),
        Err(std::fs::TryLockError::Error(e)) => Err(io("cannot lock", &path)(e)),
    }
}

/// Writes the effective configuration. If the run exists, only keys that may change during a run may differ.
fn write_config(config: &Config, run: &Path, note: &dyn Fn(&str)) -> Result<PathBuf, LaunchError> {
    let path = run.join("config.toml");
    let text = config.to_toml().map_err(|e| LaunchError::Data(format!("configuration: {e}")))?;
    if let Ok(old) = std::fs::read_to_string(&path) {
        let damaged = |why: String| LaunchError::DamagedConfig { path: path.clone(), why };
        // An empty file does not mean defaults: a write was interrupted.
        if old.trim().is_empty() {
            return Err(damaged("it is empty".into()));
        }
        let old = unveil_config::parse(&path.display().to_string(), &old).map_err(|e| damaged(e.to_string()))?;
        let (allowed, refused): (Vec<_>, Vec<_>) =
            unveil_config::changes(&old, config).into_iter().partition(|c| c.allowed);
        if !refused.is_empty() {
            let difference = refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            return Err(LaunchError::OtherConfig { dir: run.to_owned(), difference });
        }
        for change in allowed.iter().filter(|c| c.key != "run.resume") {
            note(&format!("the run continues with {change}"));
        }
        if allowed.iter().any(|c| c.key == "learner.steps") {
            remove_results(config, run)?;
        }
    }
    unveil_core::write_atomic(&path, text.as_bytes()).map_err(io("cannot write", &path))?;
    Ok(path)
}

/// Removes the results of a run whose end has moved, so that stage 2 continues to the new end and is evaluated again. Checkpoints stay.
fn remove_results(config: &Config, run: &Path) -> Result<(), LaunchError> {
    let ignore_missing = |path: &Path, result: std::io::Result<()>| match result {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("cannot remove", path)(e)),
        _ => Ok(()),
    };
    for file in [run.join("summary.json"), run.join("eval").join("after.json")] {
        ignore_missing(&file, std::fs::remove_file(&file))?;
    }
    let model = config.final_model();
    ignore_missing(&model, std::fs::remove_dir_all(&model))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(run: &Path) -> Config {
        let mut config = Config::default();
        config.run.dir = run.display().to_string();
        config
    }

    #[test]
    fn the_summary_counts_replaced_groups_of_the_lineage() {
        let train = |step: u64, replaced: u64| json!({"kind": "train", "step": step, "replaced": replaced, "filtered_responses": 2});
        let resumed = json!({"kind": "resumed", "stage": "rl", "step": 1});
        let events =
            vec![train(1, 3), train(2, 100), resumed, train(2, 4), json!({"kind": "sft", "step": 1, "replaced": 9})];
        let mut config = Config::default();
        let mut summary = json!({});
        add_sampling_counts(&mut summary, &config, events.clone());
        assert_eq!(summary, json!({}), "off");
        config.learner.max_replaced = 5;
        add_sampling_counts(&mut summary, &config, events.clone());
        assert_eq!(summary, json!({"replaced_groups": 7}));
        config.learner.overlong_filter = true;
        add_sampling_counts(&mut summary, &config, events);
        assert_eq!(summary, json!({"replaced_groups": 7, "filtered_responses": 4}));
    }

    /// A crash or a full disk during a write must not be mistaken for defaults or for another run.
    #[test]
    fn truncated_saved_configuration_is_reported_as_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        config.data.synth.size = 64;
        let path = write_config(&config, dir.path(), &|_| {}).unwrap();
        let whole = std::fs::read_to_string(&path).unwrap();
        assert_eq!(write_config(&config, dir.path(), &|_| {}).unwrap(), path);
        let within = whole.rfind(" = ").unwrap() + 3;
        for cut in ["", " \n", &whole[..within]] {
            std::fs::write(&path, cut).unwrap();
            let e = write_config(&config, dir.path(), &|_| {}).unwrap_err().to_string();
            assert!(e.contains("config.toml is damaged") && e.contains("Remove only that file"), "{e}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), cut, "the file is not touched");
        }
        std::fs::remove_file(&path).unwrap();
        write_config(&config, dir.path(), &|_| {}).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
    }

    #[test]
    fn saved_configuration_is_replaced_atomically() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        let path = write_config(&config, dir.path(), &|_| {}).unwrap();
        let before = dir.path().join("before");
        let whole = std::fs::read_to_string(&path).unwrap();
        // A reader of the replaced file still sees all of it.
        std::fs::hard_link(&path, &before).unwrap();
        config.learner.steps += 1;
        write_config(&config, dir.path(), &|_| {}).unwrap();
        assert_eq!(std::fs::read_to_string(&before).unwrap(), whole);
        assert_ne!(std::fs::read_to_string(&path).unwrap(), whole);
    }
}
