//! Stage 2, the learner process: load a checkpoint or the model of stage 1, serve experience, update, publish,
//! evaluate, save.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tch::Kind;
use tokio::runtime::Handle;
use unveil_checkpoint::{Reader, Resume};
use unveil_config::schema::WeightSync;
use unveil_config::{Config, Role};
use unveil_core::{Sampling, TrainGroup};
use unveil_experience::{Event, Experience, Settings};
use unveil_experience_rpc::{BroadcastOptions, ExperienceServer, ExperienceServerOptions, NewWeights, WORKER_TIMEOUT};
use unveil_model::gpu_memory;
use unveil_service::ServiceAccess;
use unveil_trainer::lora::BaseModel;
use unveil_trainer::{PolicyTrainer, UpdateReport, ZeroStage, dump, rank_device, wire_kind};

use crate::checkpoint_meta::{BestCheckpoint, CheckpointMeta, SavedAdapters, StaticFiles};
use crate::error::{LearnerError, Result};
use crate::follower::follow;
use crate::group_outcomes::group_outcomes;
use crate::masked_rewards::MaskedRewardWindow;
use crate::metrics::LearnerMetrics;
use crate::rank_control::{Command, RankControl};
use crate::resume::compatibility::{allowed_changes, report_changes};
use crate::resume::resume_on_all_ranks;
use crate::rollout_log;
use crate::saver::{Save, SaveResult, Saver};
use crate::snapshot::copy_to_host;
use crate::stage::{Evaluation, Outcome, Stage};
use crate::trainer_start::{make_trainer, read_checkpoint};

/// Interval at which a wait for a batch checks for cancellation.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time for workers to be notified of the end of the run.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(3);

/// A milestone of the start-up that other processes wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Rendezvous address of the other ranks; only with several ranks.
    Ranks(SocketAddr),
    /// Address of the experience service for rollout workers.
    Experience(SocketAddr),
    /// This rank, which is not rank 0, has joined the others and loaded the model.
    Joined,
}

/// Runs this rank of stage 2 until it ends or is interrupted. Rank 0 calls `on_ready` when other ranks can join and
/// when its weights are published; the other ranks call it when they have joined.
///
/// Checkpoints are saved under the prefix of the run. The model of the best evaluated checkpoint, or of the last update
/// if there was no evaluation, is exported to [`Stage::out`]. Must not be called within a tokio runtime.
///
/// # Errors
/// See [`LearnerError`].
pub fn run_rl(mut stage: Stage<'_>, mut on_ready: impl FnMut(Ready)) -> Result<Outcome> {
    if stage.config.learner.parallel.rank > 0 {
        return follow(&stage, || on_ready(Ready::Joined));
    }
    unveil_reward::check_records(stage.config, stage.data.records())
        .map_err(|e| LearnerError::Setting(e.to_string()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(LearnerError::io("runtime"))?;
    let mut run = Run::open(&mut stage, runtime.handle(), |address| on_ready(Ready::Ranks(address)))?;
    run.publish(wire_kind(stage.config))?;
    on_ready(Ready::Experience(run.server.address()));
    let outcome = run.train(&mut stage)?;
    let Run { trainer, server, mut saver, base, best, .. } = run;
    if outcome.interrupted {
        return Ok(outcome);
    }
    server.finish(SHUTDOWN_GRACE);
    let exported = best.map_or(outcome.step, |b| b.step);
    match (base, trainer) {
        (Some(base), mut trainer) => saver.export_adapted(exported, stage.out, trainer.vlm_mut(), &base)?,
        (None, _) => saver.export(exported, stage.out)?,
    }
    Ok(Outcome { exported: Some(exported), ..outcome })
}

/// Rank 0 of stage 2.
struct Run {
    trainer: PolicyTrainer,
    control: RankControl,
    server: ExperienceServer,
    saver: Saver,
    files: StaticFiles,
    /// Base model of the adapters; `None` in full fine-tuning.
    base: Option<BaseModel>,
    best: Option<BestCheckpoint>,
    /// Best evaluated step with a committed checkpoint.
    best_saved: Option<BestCheckpoint>,
    /// Scores of steps whose saves are pending.
    scores: BTreeMap<u64, f64>,
    responses: u64,
    /// Responses counted before this process resumed the run.
    responses_before: u64,
    metrics: LearnerMetrics,
    /// Masked reward components of the last groups.
    masked: MaskedRewardWindow,
}

impl Run {
    /// Joins the ranks, resumes from a checkpoint if there is one, and starts the experience server.
    fn open(stage: &mut Stage<'_>, handle: &Handle, on_listening: impl FnOnce(SocketAddr)) -> Result<Self> {
        let config = stage.config;
        let files = StaticFiles::read(stage.model_dir)?;
        let resume: Resume = config.run.resume.parse()?;
        let mut saver = Saver::open(handle, config, "", &stage.environment)?;
        let mut candidates = saver.resume_candidates(resume)?;
        let control = RankControl::open(config, stage.model_dir, &stage.data.ids(), on_listening)?;
        let (mut trainer, base) = make_trainer(stage, &control)?;
        let attempt = |r: &Reader| read_checkpoint(stage, &trainer, base.as_ref(), r, handle);
        let resumed = resume_on_all_ranks(&control, (handle, saver.store()), Some(&mut candidates), attempt)?;
        if let Some((info, meta)) = &resumed {
            let changed = allowed_changes(info.step, &meta.config, config)?;
            report_changes(&mut *stage.progress, info.step, candidates.warnings(), &changed);
        }
        saver.record_resume(resumed.as_ref().map(|(info, _)| info))?;
        let settings = experience_settings(config, saver.term);
        let ids = stage.data.ids();
        let machine = match &resumed {
            Some((info, meta)) => {
                trainer.resume_from(&meta.progress)?;
                restore_experience(&trainer, meta, info.step, settings, ids)?
            }
            None => Experience::new(settings, ids)?,
        };
        let machine = machine.with_max_losses(config.rollout.max_losses);
        let kind = if resumed.is_some() { "resumed" } else { "started" };
        stage.event(&json!({"kind": kind, "stage": "rl", "step": trainer.step(), "term": saver.term}))?;
        let options = ExperienceServerOptions {
            listen: config.learner.listen.clone(),
            sampling: sampling(config),
            stop: config.rollout.stop.clone(),
            vocab: trainer.vlm().config().text.vocab_size as u32,
            fixed_lease_size: config.run.deterministic.then_some(config.rollout.groups_per_lease),
            broadcast: match config.rollout.weight_sync {
                WeightSync::Grpc => None,
                WeightSync::Broadcast => Some(BroadcastOptions {
                    device: rank_device(config)?,
                    timeout: Duration::from_secs_f64(config.rollout.broadcast_s),
                }),
            },
        };
        let access = ServiceAccess::of(config, Role::Learner)?;
        let server = ExperienceServer::start_with_access(handle, options, access.clone(), machine, stage.data.clone())?;
        let metrics = LearnerMetrics::new(trainer.settings().agreement_limit);
        server.serve_metrics(&config.learner.metrics_listen, metrics.registry(), &access)?;
        saver.set_metrics(metrics.save_metrics());
        let (best, responses) = resumed.map_or((None, 0), |(_, meta)| (meta.best, meta.seen));
        let masked = MaskedRewardWindow::new(config);
        Ok(Self {
            trainer,
            control,
            server,
            saver,
            files,
            base,
            best,
            best_saved: best,
            scores: BTreeMap::new(),
            responses,
            responses_before: responses,
            metrics,
            masked,
        })
    }

    /// Gathers all sharded parameters on this rank.
    fn gather_parameters(&mut self) -> Result<()> {
        if self.control.ranks.zero_stage() == ZeroStage::Parameters {
            self.control.command(|| Command::GatherParameters)?;
            self.trainer.gather_parameters()?;
        }
        Ok(())
    }

    /// Publishes the current parameters in the dtype that workers use.
    fn publish(&mut self, kind: Kind) -> Result<()> {
        self.gather_parameters()?;
        let vlm = self.trainer.vlm();
        let version = self.trainer.step();
        let named = vlm.named_parameters();
        let adapters = vlm.adapters();
        let freezing = &self.trainer.settings().freezing;
        let changes =
            |name: &str| vlm.parameter(name).is_none() || (adapters.is_none() && freezing.is_ever_trained(name));
        Ok(self.server.publish(&NewWeights { version, named, kind, adapters, may_change: &changes })?)
    }

    /// Trains until the last update or a cancellation, and saves the last checkpoint.
    fn train(&mut self, stage: &mut Stage<'_>) -> Result<Outcome> {
        let config = stage.config;
        let metrics = self.metrics.clone();
        let total = config.learner.steps;
        let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
        let mut outcome = Outcome::default();
        if self.trainer.step() == 0 && total > 0 && config.learner.eval_every > 0 {
            self.gather_parameters()?;
            outcome.last = stage.evaluate("rl", self.trainer.vlm_mut(), 0)?;
        }
        while self.trainer.step() < total && !stage.cancel.is_cancelled() {
            let start = Instant::now();
            let Some(batch) = self.next_batch(stage)? else { break };
            let wait_ms = start.elapsed().as_secs_f64() * 1e3;
            if !config.run.dump_batch.is_empty() {
                let dump_dir = Path::new(&config.run.dump_batch).join(format!("step-{}", self.trainer.step() + 1));
                self.control.command(|| Command::ComputeValues(RankControl::to_wire(&batch)))?;
                dump::write(&dump_dir, config, &self.trainer, &batch)?;
            }
            if self.control.command(|| Command::Update(RankControl::to_wire(&batch)))? {
                // Another rank was asked to stop: the run ends after this update.
                stage.cancel.cancel();
            }
            let spans = self.server.training_spans(self.trainer.step() + 1, &batch);
            let mut report = self.trainer.update(&batch)?;
            drop(spans);
            report.wait_ms = wait_ms;
            report.step_ms = start.elapsed().as_secs_f64() * 1e3 - wait_ms;
            report.stale_groups = self.server.stats().stale;
            let step = self.trainer.step();
            self.server.settle(step, &group_outcomes(&report, &batch))?;
            if step < total {
                metrics.time("publish", || self.publish(wire_kind(config)))?;
            }
            self.report_update(stage, &report, &batch)?;
            self.masked.record_batch(step, &batch)?;
            let is_last = step == total;
            let evaluation = if is_last || due(config.learner.eval_every, step) {
                self.gather_parameters()?;
                metrics.time("evaluate", || stage.evaluate("rl", self.trainer.vlm_mut(), step))?
            } else {
                None
            };
            let is_best = self.update_best(step, evaluation.as_ref());
            outcome.last = evaluation.or(outcome.last);
            if is_best || is_last || due(config.learner.checkpoint_every, step) {
                metrics.time("save", || self.save(stage, is_best))?;
            }
        }
        (outcome.step, outcome.skipped) = (self.trainer.step(), self.trainer.counters().skipped);
        let pending = self.saver.wait(&mut self.control)?;
        self.record_save(stage, pending)?;
        if self.saver.last() != Some(outcome.step) {
            self.save(stage, false)?;
            let last = self.saver.wait_last(&mut self.control)?;
            self.record_save(stage, last.map(SaveResult::Saved))?;
        }
        self.gather_parameters()?;
        self.control.command(|| Command::Shutdown)?;
        outcome.interrupted = outcome.step < total;
        Ok(outcome)
    }

    /// Waits for the next batch; returns `None` if the run was cancelled.
    fn next_batch(&mut self, stage: &mut Stage<'_>) -> Result<Option<Vec<TrainGroup>>> {
        loop {
            if self.control.keepalive()? {
                stage.cancel.cancel();
            }
            let result = self.saver.poll(&mut self.control)?;
            self.record_save(stage, result)?;
            let batch = self.server.next_batch(POLL_INTERVAL)?;
            for event in self.server.drain_events() {
                if let Event::Dropped { why, .. } = &event {
                    self.masked.record_dropped(why);
                }
                // Successful leases and submissions are part of the `train` events.
                if !matches!(event, Event::Leased { .. } | Event::Submitted { .. } | Event::Trained { .. }) {
                    stage.event(&with_kind("experience", &event)?)?;
                }
            }
            for report in self.server.drain_broadcasts() {
                stage.event(&with_kind("broadcast", &report)?)?;
            }
            if batch.is_some() || stage.cancel.is_cancelled() {
                return Ok(batch.filter(|_| !stage.cancel.is_cancelled()));
            }
        }
    }

    /// Records the score of an evaluation; returns whether it is the best so far.
    fn update_best(&mut self, step: u64, evaluation: Option<&Evaluation>) -> bool {
        let Some(score) = evaluation.map(|e| e.score).filter(|s| s.is_finite()) else { return false };
        self.scores.insert(step, score);
        let is_best = self.best.is_none_or(|b| score > b.score);
        if is_best {
            self.best = Some(BestCheckpoint { step, score });
        }
        is_best
    }

    /// Logs the result of a save. After a failure, the best step is again the best one that has a checkpoint.
    fn record_save(&mut self, stage: &mut Stage<'_>, result: Option<SaveResult>) -> Result<()> {
        let Some(result) = result else { return Ok(()) };
        match &result {
            SaveResult::Saved(saved) => {
                let step = saved.step();
                let score = self.scores.remove(&step);
                if let Some(score) = score.filter(|s| self.best_saved.is_none_or(|b| *s > b.score)) {
                    self.best_saved = Some(BestCheckpoint { step, score });
                }
                let is_surpassed = |b: BestCheckpoint| self.best_saved.is_some_and(|saved| saved.score > b.score);
                if self.best.is_some_and(is_surpassed) {
                    self.best = self.best_saved;
                }
            }
            SaveResult::Failed(failed) => {
                self.scores.remove(&failed.step());
                if self.best.is_some_and(|b| b.step == failed.step()) {
                    self.best = self.best_saved;
                }
            }
        }
        stage.event(&result.event("rl"))
    }

    /// Starts saving a checkpoint on all ranks, after the previous save has finished.
    fn save(&mut self, stage: &mut Stage<'_>, best: bool) -> Result<()> {
        let wait_start = Instant::now();
        let previous = self.saver.wait(&mut self.control)?;
        self.record_save(stage, previous)?;
        let wait = wait_start.elapsed();
        let step = self.trainer.step();
        let term = self.saver.term;
        self.control.command(|| Command::Save { step, term })?;
        let copy = copy_to_host(&self.trainer.state_to_save()?, &self.saver.buffers)?;
        let vlm = self.trainer.vlm();
        let base = self.base.as_ref();
        let files = self.files.objects(vlm, base)?;
        let meta = CheckpointMeta {
            experience: Some(self.server.snapshot()),
            best: self.best,
            adapters: SavedAdapters::new(vlm, base),
            ..CheckpointMeta::new("rl", stage.config, self.trainer.progress(), self.responses)
        };
        let save = Save { meta: &meta, best, is_only_rank: self.control.ranks.size() == 1 };
        self.saver.save(step, (wait, copy), files, save)
    }

    /// Reports an update to the metrics, the event log, the rollout log and the progress display.
    fn report_update(&mut self, stage: &mut Stage<'_>, report: &UpdateReport, batch: &[TrainGroup]) -> Result<()> {
        let mut event = with_kind("train", report)?;
        // The term distinguishes the events of a learner that was paused and superseded from those of its successor.
        event["term"] = self.saver.term.into();
        // Metrics come first, so that a reader of the event finds it counted in them.
        self.metrics.record_update(report, batch, gpu_memory(self.trainer.vlm().device()));
        stage.event(&event)?;
        let reading = &self.trainer.settings().mentions.reader;
        rollout_log::write(Path::new(&stage.config.run.dir), report.step, batch, &stage.data, reading)?;
        self.responses += report.responses as u64;
        let mut parts: Vec<(&str, f64)> = report.reward.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        parts.sort_by_key(|(k, _)| *k != "total");
        stage.progress.update(report.step, self.responses - self.responses_before, &parts);
        if let Some(why) = &report.skipped {
            stage.progress.note(&format!("step {} skipped: {why}", report.step));
        }
        Ok(())
    }
}

/// Returns the sampling settings of the configuration.
pub fn sampling(config: &Config) -> Sampling {
    let r = &config.rollout;
    Sampling {
        n: r.n,
        temperature: r.temperature,
        top_k: r.top_k,
        top_p: r.top_p,
        min_p: r.min_p,
        max_new_tokens: r.max_new_tokens,
        seed: config.run.seed,
        logprobs: r.logprobs,
    }
}

/// Returns the settings of the experience state machine.
fn experience_settings(config: &Config, term: u64) -> Settings {
    Settings {
        groups_per_step: config.learner.groups,
        max_staleness: config.rollout.max_staleness,
        lease_s: config.rollout.lease_s,
        stall_s: config.rollout.stall_s,
        silence_s: WORKER_TIMEOUT.as_secs_f64(),
        seed: config.run.seed,
        term,
        total_groups: Some(config.learner.steps * config.learner.groups as u64),
    }
}

/// Restores the experience state machine from a checkpoint.
fn restore_experience(
    trainer: &PolicyTrainer,
    meta: &CheckpointMeta,
    step: u64,
    settings: Settings,
    ids: Vec<String>,
) -> Result<Experience<TrainGroup>> {
    let snapshot = meta
        .experience
        .as_ref()
        .ok_or_else(|| LearnerError::CheckpointState { step, what: "it has no position in the data".into() })?;
    let mut machine = Experience::restore(settings, ids, snapshot)?;
    if machine.version() < trainer.step() {
        machine.publish(trainer.step())?;
    }
    Ok(machine)
}

/// Serializes an event and adds its kind.
fn with_kind(kind: &str, event: &impl serde::Serialize) -> Result<Value> {
    let mut out = json!({"kind": kind});
    let value =
        serde_json::to_value(event).map_err(|e| LearnerError::Setting(format!("cannot encode event `{kind}`: {e}")))?;
    if let (Some(map), Value::Object(fields)) = (out.as_object_mut(), value) {
        map.extend(fields);
    }
    Ok(out)
}
