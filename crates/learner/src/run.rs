//! Stage 2, reinforcement learning: its parts of the loop that both stages share, which serve experience and publish weights.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::runtime::Handle;
use unveil_config::schema::{Critic, WeightSync};
use unveil_config::{Config, Role};
use unveil_core::{Sampling, TrainGroup};
use unveil_experience::{Event, Experience, Settings};
use unveil_experience_rpc::{BroadcastOptions, ExperienceServer, ExperienceServerOptions, NewWeights, WORKER_TIMEOUT};
use unveil_service::ServiceAccess;
use unveil_torch_ext::gpu_memory;
use unveil_trainer::{PolicyTrainer, UpdateReport, dump, rank_device, wire_kind};

use crate::checkpoint_meta::CheckpointMeta;
use crate::dynamic_sampling;
use crate::error::{LearnerError, Result};
use crate::follower::follow;
use crate::group_outcomes::group_outcomes;
use crate::masked_rewards::MaskedRewardWindow;
use crate::metrics::LearnerMetrics;
use crate::rank_batch::BatchCommand;
use crate::rank_control::RankControl;
use crate::rollout_log;
use crate::stage::{Outcome, Stage};
use crate::stage_loop::{StageLoop, StageParts, StageStart};
use crate::stage_plan::StagePlan;
use crate::threads::start_runtime;
use crate::trainer_start::make_trainer;

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
pub fn run_rl(stage: Stage<'_>, mut on_ready: impl FnMut(Ready)) -> Result<Outcome> {
    let config = stage.config;
    if config.learner.parallel.rank > 0 {
        let ignore_address = |_: SocketAddr| ();
        let parallel = &config.learner.parallel;
        let control = RankControl::open(config, stage.model_dir, &stage.data.ids(), parallel, ignore_address)?;
        let plan = plan(config);
        return follow(&control, &stage, &plan, make_trainer, BatchCommand::execute, || on_ready(Ready::Joined));
    }
    unveil_reward::check_records(config, stage.data.records())?;
    let runtime = start_runtime(2)?;
    let (mut run, mut parts) = RlParts::open(stage, runtime.handle(), |address| on_ready(Ready::Ranks(address)))?;
    parts.publish(&mut run)?;
    on_ready(Ready::Experience(parts.server.address()));
    let outcome = run.train(&mut parts)?;
    if outcome.interrupted {
        return Ok(outcome);
    }
    parts.server.finish(SHUTDOWN_GRACE);
    run.export(outcome)
}

/// Returns the plan of stage 2.
fn plan(config: &Config) -> StagePlan {
    let learner = &config.learner;
    StagePlan {
        name: "rl",
        prefix: "",
        total: learner.steps,
        eval_every: learner.eval_every,
        checkpoint_every: learner.checkpoint_every,
        evaluates_start: true,
        exports_best: true,
        logs_term: true,
        critic: learner.critic == Critic::Separate,
    }
}

/// Rank 0 of stage 2.
type RlLoop<'a> = StageLoop<'a, PolicyTrainer>;

/// The parts of stage 2: the experience server, the publication of weights, and the checks of rewards.
struct RlParts {
    server: ExperienceServer,
    responses: u64,
    /// Responses counted before this process resumed the run.
    responses_before: u64,
    metrics: LearnerMetrics,
    /// Masked reward components of the last groups.
    masked: MaskedRewardWindow,
}

impl RlParts {
    /// Joins the ranks, resumes from a checkpoint if there is one, and starts the experience server.
    fn open<'a>(
        stage: Stage<'a>,
        handle: &Handle,
        on_listening: impl FnOnce(SocketAddr),
    ) -> Result<(RlLoop<'a>, Self)> {
        let config = stage.config;
        let start = StageStart::claim(&stage, plan(config), config.run.resume.parse()?, handle)?;
        let parallel = &config.learner.parallel;
        let control = RankControl::open(config, stage.model_dir, &stage.data.ids(), parallel, on_listening)?;
        let trainer = make_trainer(&stage, &control)?;
        let (mut run, (machine, responses)) = start.resume(stage, control, trainer, |run, meta| {
            Ok((open_experience(run, meta)?, meta.map_or(0, |m| m.seen)))
        })?;
        let options = ExperienceServerOptions {
            listen: config.learner.listen.clone(),
            sampling: sampling(config),
            stop: config.rollout.stop.clone(),
            vocab: run.trainer.vlm().config().text.vocab_size as u32,
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
        let data = run.stage.data.clone();
        let server = ExperienceServer::start_with_access(handle, options, access.clone(), machine, data)?;
        let metrics = LearnerMetrics::new(run.trainer.settings().agreement_limit);
        server.serve_metrics(&config.learner.metrics_listen, metrics.registry(), &access)?;
        run.set_metrics(metrics.clone());
        let masked = MaskedRewardWindow::new(config);
        Ok((run, Self { server, responses, responses_before: responses, metrics, masked }))
    }

    /// Publishes the current parameters in the dtype that workers use.
    fn publish(&self, run: &mut RlLoop<'_>) -> Result<()> {
        let by_parts = run.begin_visit()?;
        let vlm = run.trainer.vlm();
        let version = run.trainer.step();
        let kind = wire_kind(run.stage.config);
        let named = vlm.named_parameters();
        let adapters = vlm.adapters();
        let freezing = &run.trainer.settings().freezing;
        let changes =
            |name: &str| vlm.parameter(name).is_none() || (adapters.is_none() && freezing.is_ever_trained(name));
        let new = NewWeights { version, named, kind, adapters, may_change: &changes };
        if by_parts {
            return self.server.publish_in_parts(&new, |pack| {
                run.trainer.visit_parameters::<LearnerError>(&mut |part| Ok(pack(part)?))
            });
        }
        Ok(self.server.publish(&new)?)
    }

    /// Waits for the next batch; returns `None` if the run was cancelled.
    fn next_batch(&mut self, run: &mut RlLoop<'_>) -> Result<Option<Vec<TrainGroup>>> {
        loop {
            run.keep_ranks()?;
            run.poll_save()?;
            let batch = self.server.next_batch(POLL_INTERVAL)?;
            for event in self.server.drain_events() {
                if let Event::Dropped { why, .. } = &event {
                    self.masked.record_dropped(why);
                }
                // Successful leases and submissions are part of the `train` events.
                if !matches!(event, Event::Leased { .. } | Event::Submitted { .. } | Event::Trained { .. }) {
                    run.stage.event(&with_kind("experience", &event)?)?;
                }
            }
            for report in self.server.drain_broadcasts() {
                run.stage.event(&with_kind("broadcast", &report)?)?;
            }
            let is_cancelled = run.stage.cancel.is_cancelled();
            if batch.is_some() || is_cancelled {
                return Ok(batch.filter(|_| !is_cancelled));
            }
        }
    }

    /// Writes responses of the batch of update `step` to the rollout log.
    fn log_rollout(&self, run: &RlLoop<'_>, step: u64, batch: &[TrainGroup]) -> Result<()> {
        let stage = &run.stage;
        let reading = &run.trainer.settings().mentions.reader;
        rollout_log::write(Path::new(&stage.config.run.dir), step, batch, &stage.data, reading)
    }

    /// Reports an update to the metrics, the event log, the rollout log and the progress display.
    fn report_update(&mut self, run: &mut RlLoop<'_>, report: &UpdateReport, batch: &[TrainGroup]) -> Result<()> {
        let mut event = with_kind("train", report)?;
        // The term distinguishes the events of a learner that was paused and superseded from those of its successor.
        event["term"] = run.term().into();
        // Metrics come first, so that a reader of the event finds it counted in them.
        self.metrics.record_update(report, batch, gpu_memory(run.trainer.vlm().device()));
        run.stage.event(&event)?;
        self.log_rollout(run, report.step, batch)?;
        let stage = &mut run.stage;
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

impl StageParts for RlParts {
    type Trainer = PolicyTrainer;

    fn update(&mut self, run: &mut RlLoop<'_>) -> Result<bool> {
        let config = run.stage.config;
        let start = Instant::now();
        let Some(batch) = self.next_batch(run)? else { return Ok(false) };
        let wait_ms = start.elapsed().as_secs_f64() * 1e3;
        let replaced = self.server.replaced();
        let next_step = run.trainer.step() + 1;
        if let Err(e) = dynamic_sampling::check_batch(&config.learner, next_step, &batch, &replaced) {
            self.log_rollout(run, next_step, &batch)?;
            return Err(e);
        }
        if !config.run.dump_batch.is_empty() {
            let dump_dir = Path::new(&config.run.dump_batch).join(format!("step-{}", run.trainer.step() + 1));
            run.send_batch(|| BatchCommand::compute_values(&batch))?;
            dump::write(&dump_dir, config, &run.trainer, &batch)?;
        }
        run.send_batch(|| BatchCommand::update(&batch))?;
        let spans = self.server.training_spans(run.trainer.step() + 1, &batch);
        let mut report = run.trainer.update(&batch)?;
        dynamic_sampling::add_to_report(&mut report, &replaced);
        drop(spans);
        report.wait_ms = wait_ms;
        report.step_ms = start.elapsed().as_secs_f64() * 1e3 - wait_ms;
        report.stale_groups = self.server.stats().stale;
        let step = run.trainer.step();
        self.server.settle(step, &group_outcomes(&report, &batch, config.learner.overlong_filter))?;
        if step < config.learner.steps {
            self.metrics.time("publish", || self.publish(run))?;
        }
        self.report_update(run, &report, &batch)?;
        self.masked.record_batch(step, &batch)?;
        Ok(true)
    }

    fn add_to_checkpoint(&self, meta: &mut CheckpointMeta) {
        meta.experience = Some(self.server.snapshot());
        meta.seen = self.responses;
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

/// Returns the experience state machine: a new one, or the one of the checkpoint that the run resumes from.
fn open_experience(run: &RlLoop<'_>, resumed: Option<&CheckpointMeta>) -> Result<Experience<TrainGroup>> {
    let config = run.stage.config;
    let settings = experience_settings(config, run.term());
    let ids = run.stage.data.ids();
    let step = run.trainer.step();
    let mut machine = match resumed {
        Some(CheckpointMeta { experience: Some(snapshot), .. }) => Experience::restore(settings, ids, snapshot)?,
        Some(_) => return Err(LearnerError::CheckpointState { step, what: "it has no position in the data".into() }),
        None => Experience::new(settings, ids)?,
    };
    if machine.version() < step {
        machine.publish(step)?;
    }
    let learner = &config.learner;
    let machine = machine.with_max_losses(config.rollout.max_losses);
    let uninformative = dynamic_sampling::uninformative(learner);
    Ok(machine.with_replacement(learner.max_replaced, uninformative, config.run.deterministic))
}

/// Serializes an event and adds its kind.
fn with_kind(kind: &'static str, event: &impl serde::Serialize) -> Result<Value> {
    let mut out = json!({"kind": kind});
    let value = serde_json::to_value(event).map_err(|source| LearnerError::Event { kind, source })?;
    if let (Some(map), Value::Object(fields)) = (out.as_object_mut(), value) {
        map.extend(fields);
    }
    Ok(out)
}
