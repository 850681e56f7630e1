//! Stage 2 from start to end: take up a checkpoint or the model of stage 1, serve experience, update, publish, evaluate, save.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tch::{Kind, Tensor};
use tokio::runtime::Handle;
use unveil_checkpoint::{Loaded, Resume};
use unveil_config::Config;
use unveil_config::schema::Dtype;
use unveil_core::{GroupId, Sampling};
use unveil_experience::{Event, Experience, Settings};

use crate::batch::TrainGroup;
use crate::dump;
use crate::error::{LearnerError, Result};
use crate::kept;
use crate::measure::UpdateReport;
use crate::serve::{Host, HostOptions, NewWeights};
use crate::settings::StepSettings;
use crate::stage::{Evaluation, Outcome, Stage, load_model};
use crate::state::{self, Best, Meta, Restored, Saver, StaticFiles};
use crate::step::Learner;

/// How often a waiting learner looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(100);
/// How long workers have to hear that the run is over.
const FAREWELL: Duration = Duration::from_secs(3);

/// Runs stage 2 to its end, or to an interrupt. `ready` is called with the address of the experience service once it serves.
///
/// Checkpoints go to the run's prefix. The model directory written to [`Stage::out`] is that of the best evaluated checkpoint,
/// or of the last update where nothing was evaluated. Call it from a thread that runs no tokio runtime.
///
/// # Errors
/// See [`LearnerError`].
pub fn run_rl(mut stage: Stage<'_>, ready: impl FnOnce(SocketAddr)) -> Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(LearnerError::io("runtime"))?;
    let mut run = Run::open(&mut stage, runtime.handle())?;
    ready(run.host.address());
    run.publish(wire_kind(stage.config))?;
    let ended = run.train(&mut stage);
    let (outcome, mut saver, host) = (ended?, run.saver, run.host);
    if outcome.interrupted {
        return Ok(outcome);
    }
    host.finish(FAREWELL);
    let chosen = run.best.map_or(outcome.step, |b| b.step);
    saver.export(chosen, stage.out)?;
    Ok(Outcome { exported: Some(chosen), ..outcome })
}

struct Run {
    learner: Learner,
    host: Host,
    saver: Saver,
    files: StaticFiles,
    best: Option<Best>,
    responses: u64,
}

impl Run {
    fn open(stage: &mut Stage<'_>, handle: &Handle) -> Result<Self> {
        let config = stage.config;
        let files = StaticFiles::read(stage.model_dir)?;
        let load = || load_model(config, config.learner.threads, stage.model_dir);
        let mut vlm = load()?;
        let resume: Resume = config.run.resume.parse()?;
        let (saver, loaded) = Saver::open(handle, config, "", &stage.environment, resume)?;
        let restored = loaded.as_ref().map(|l| Restored::read(l, "rl", config.run.seed)).transpose()?;
        if let Some(r) = &restored {
            vlm.load_state(&r.weights)?;
        }
        let reference = if config.learner.kl_coef > 0.0 { Some(load()?) } else { None };
        let banned = stage.data.preparer().tokenizer().special().banned.clone();
        let settings = StepSettings::new(config, &vlm, &banned);
        let vocab = vlm.config().text.vocab_size as u32;
        let mut learner = Learner::new(vlm, reference, settings)?;
        let accounting = accounting(config, saver.term);
        let ids = stage.data.ids();
        let machine = match (&restored, &loaded) {
            (Some(r), Some(l)) => resumed(&mut learner, r, l, accounting, ids)?,
            _ => Experience::new(accounting, ids)?,
        };
        let kind = if restored.is_some() { "resumed" } else { "started" };
        stage.event(&json!({"kind": kind, "stage": "rl", "step": learner.step()}))?;
        let options = HostOptions {
            listen: config.learner.listen.clone(),
            sampling: sampling(config),
            stop: config.rollout.stop.clone(),
            vocab,
        };
        let host = Host::start(handle, options, machine, stage.data.clone())?;
        let best = restored.and_then(|r| r.meta.best);
        Ok(Self { learner, host, saver, files, best, responses: 0 })
    }

    /// Publishes the parameters as they are now, in the kind of numbers that workers hold them in.
    fn publish(&self, kind: Kind) -> Result<()> {
        let vlm = self.learner.vlm();
        let changes = |name: &str| vlm.parameter(name).is_none_or(Tensor::requires_grad);
        let version = self.learner.step();
        self.host.publish(&NewWeights { version, named: vlm.named_parameters(), kind, changes: &changes })
    }

    fn train(&mut self, stage: &mut Stage<'_>) -> Result<Outcome> {
        let config = stage.config;
        let total = config.learner.steps;
        let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
        let mut outcome = Outcome::default();
        let begun = self.learner.step();
        if begun == 0 && total > 0 && config.learner.eval_every > 0 {
            outcome.last = stage.evaluate("rl", self.learner.vlm_mut(), 0)?;
        }
        while self.learner.step() < total && !stage.cancel.is_cancelled() {
            let waiting = Instant::now();
            let Some(batch) = self.wait(stage)? else { break };
            let wait_ms = waiting.elapsed().as_secs_f64() * 1e3;
            if !config.run.dump_batch.is_empty() {
                let to = Path::new(&config.run.dump_batch).join(format!("step-{}", self.learner.step() + 1));
                dump::write(&to, config, &self.learner, &batch)?;
            }
            let mut report = self.learner.update(&batch)?;
            (report.wait_ms, report.step_ms) = (wait_ms, waiting.elapsed().as_secs_f64() * 1e3 - wait_ms);
            report.stale_groups = self.host.stats().stale;
            let step = self.learner.step();
            let ids: Vec<GroupId> = batch.iter().map(|g| g.id.clone()).collect();
            self.host.trained(step, &ids)?;
            if step < total {
                self.publish(wire_kind(config))?;
            }
            self.tell(stage, &report, &batch)?;
            let last = step == total;
            let evaluated = if last || due(config.learner.eval_every, step) {
                stage.evaluate("rl", self.learner.vlm_mut(), step)?
            } else {
                None
            };
            let better = self.judge(step, evaluated.as_ref());
            outcome.last = evaluated.or(outcome.last);
            if better || last || due(config.learner.checkpoint_every, step) {
                self.save(stage, better)?;
            }
        }
        (outcome.step, outcome.skipped) = (self.learner.step(), self.learner.counters().skipped);
        if self.saver.last() != Some(outcome.step) {
            self.save(stage, false)?;
        }
        if let Some(info) = self.saver.wait()? {
            stage.event(&state::event("rl", &info))?;
        }
        outcome.interrupted = outcome.step < total;
        Ok(outcome)
    }

    /// The next batch; `None` when the run is to stop.
    fn wait(&self, stage: &mut Stage<'_>) -> Result<Option<Vec<TrainGroup>>> {
        loop {
            let batch = self.host.next_batch(LOOK)?;
            for event in self.host.drain_events() {
                // Leases and submissions that go as they should are in the `train` events.
                if !matches!(event, Event::Leased { .. } | Event::Submitted { .. } | Event::Trained { .. }) {
                    stage.event(&with_kind("experience", &event)?)?;
                }
            }
            if batch.is_some() || stage.cancel.is_cancelled() {
                return Ok(batch.filter(|_| !stage.cancel.is_cancelled()));
            }
        }
    }

    fn judge(&mut self, step: u64, found: Option<&Evaluation>) -> bool {
        let Some(score) = found.map(|e| e.score).filter(|s| s.is_finite()) else { return false };
        let better = self.best.is_none_or(|b| score > b.score);
        if better {
            self.best = Some(Best { step, score });
        }
        better
    }

    fn save(&mut self, stage: &mut Stage<'_>, best: bool) -> Result<()> {
        let objects =
            state::objects(&self.files, self.learner.vlm(), &self.learner.optimizer, self.learner.value_head())?;
        let meta = Meta {
            stage: "rl".into(),
            counters: self.learner.counters(),
            seed: stage.config.run.seed,
            experience: Some(self.host.snapshot()),
            best: self.best,
            kl: Some(self.learner.kl_controller()),
        };
        if let Some(info) = self.saver.save(self.learner.step(), objects, &meta, best)? {
            stage.event(&state::event("rl", &info))?;
        }
        Ok(())
    }

    fn tell(&mut self, stage: &mut Stage<'_>, report: &UpdateReport, batch: &[TrainGroup]) -> Result<()> {
        stage.event(&with_kind("train", report)?)?;
        kept::write(Path::new(&stage.config.run.dir), report.step, batch, &stage.data)?;
        self.responses += report.responses as u64;
        let mut parts: Vec<(&str, f64)> = report.reward.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        parts.sort_by_key(|(k, _)| *k != "total");
        stage.progress.update(report.step, self.responses, &parts);
        if let Some(why) = &report.skipped {
            stage.progress.note(&format!("step {} skipped: {why}", report.step));
        }
        Ok(())
    }
}

/// Kind of numbers that workers hold weights in.
fn wire_kind(config: &Config) -> Kind {
    match config.run.dtype {
        Dtype::Float32 => Kind::Float,
        Dtype::Bfloat16 => Kind::BFloat16,
    }
}

/// How the configuration has responses sampled.
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

fn accounting(config: &Config, term: u64) -> Settings {
    Settings {
        groups_per_step: config.learner.groups,
        max_staleness: config.rollout.max_staleness,
        lease_s: config.rollout.lease_s,
        seed: config.run.seed,
        term,
        total_groups: Some(config.learner.steps * config.learner.groups as u64),
    }
}

fn resumed(
    learner: &mut Learner,
    r: &Restored,
    l: &Loaded,
    accounting: Settings,
    ids: Vec<String>,
) -> Result<Experience<TrainGroup>> {
    learner.restore(&r.moments, r.head.as_deref(), r.meta.counters, r.meta.kl.as_ref())?;
    let snapshot = r.meta.experience.as_ref().ok_or_else(|| LearnerError::State {
        step: l.info.step,
        what: "it does not say where the run stood in its data".into(),
    })?;
    let mut machine = Experience::restore(accounting, ids, snapshot)?;
    if machine.version() < learner.step() {
        machine.published(learner.step())?;
    }
    Ok(machine)
}

fn with_kind(kind: &str, event: &impl serde::Serialize) -> Result<Value> {
    let mut out = json!({"kind": kind});
    let value = serde_json::to_value(event).map_err(|e| LearnerError::Setting(format!("event `{kind}`: {e}")))?;
    if let (Some(map), Value::Object(fields)) = (out.as_object_mut(), value) {
        map.extend(fields);
    }
    Ok(out)
}
