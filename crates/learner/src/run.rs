//! Stage 2 from start to end: take up a checkpoint or the model of stage 1, serve experience, update, publish, evaluate, save.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;
use unveil_checkpoint::{Reader, Resume};
use unveil_config::schema::{Critic, Dtype, WeightSync};
use unveil_config::{Config, Role};
use unveil_core::Sampling;
use unveil_experience::{Event, Experience, Settings};
use unveil_model::{Vlm, gpu_memory};
use unveil_service::Access;

use crate::allowed::{allowed, tell as tell_changes};
use crate::batch::TrainGroup;
use crate::crew::{Crew, Order, device};
use crate::dump;
use crate::error::{LearnerError, Result};
use crate::follow::follow;
use crate::kept;
use crate::lora::{self, Base};
use crate::masked::Window;
use crate::measure::UpdateReport;
use crate::meter::Meter;
use crate::resume::take_up;
use crate::saver::{Ended, Save, Saver};
use crate::serve::{Broadcasting, DEAD, Host, HostOptions, NewWeights};
use crate::settings::StepSettings;
use crate::setup::Models;
use crate::shard::Zero;
use crate::stage::{Evaluation, Outcome, Stage, load_model_as};
use crate::state::{Best, Meta, SavedAdapters, StaticFiles};
use crate::step::Learner;

/// How often a waiting learner looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(100);
/// How long workers have to hear that the run is over.
const FAREWELL: Duration = Duration::from_secs(3);

/// An address that others wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Where the other ranks of the learner meet rank 0; only where there are some.
    Ranks(SocketAddr),
    /// Where rollout workers find the experience service.
    Experience(SocketAddr),
    /// This rank, not rank 0, has met the others and holds the model.
    Joined,
}

/// Runs this rank of stage 2 to its end, or to an interrupt. Rank 0 calls `ready` when others can reach it and its weights are
/// published, the others when they have joined it.
///
/// Checkpoints go to the run's prefix. The model directory written to [`Stage::out`] is that of the best evaluated checkpoint,
/// or of the last update where nothing was evaluated. Call it from a thread that runs no tokio runtime.
///
/// # Errors
/// See [`LearnerError`].
pub fn run_rl(mut stage: Stage<'_>, mut ready: impl FnMut(Ready)) -> Result<Outcome> {
    if stage.config.learner.parallel.rank > 0 {
        return follow(&stage, || ready(Ready::Joined));
    }
    unveil_reward::require(stage.config, stage.data.records()).map_err(|e| LearnerError::Setting(e.to_string()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(LearnerError::io("runtime"))?;
    let mut run = Run::open(&mut stage, runtime.handle(), |address| ready(Ready::Ranks(address)))?;
    run.publish(wire_kind(stage.config))?;
    ready(Ready::Experience(run.host.address()));
    let ended = run.train(&mut stage);
    let (outcome, Run { learner, host, mut saver, base, best, .. }) = (ended?, run);
    if outcome.interrupted {
        return Ok(outcome);
    }
    host.finish(FAREWELL);
    let chosen = best.map_or(outcome.step, |b| b.step);
    match (base, learner) {
        (Some(base), mut learner) => saver.export_adapted(chosen, stage.out, learner.vlm_mut(), &base)?,
        (None, _) => saver.export(chosen, stage.out)?,
    }
    Ok(Outcome { exported: Some(chosen), ..outcome })
}

struct Run {
    learner: Learner,
    crew: Crew,
    host: Host,
    saver: Saver,
    files: StaticFiles,
    /// What the adapters lie beside, where adapters are trained.
    base: Option<Base>,
    best: Option<Best>,
    /// The best step that there is a checkpoint of.
    best_saved: Option<Best>,
    /// Scores of steps whose saves have not ended.
    scores: BTreeMap<u64, f64>,
    responses: u64,
    /// Of these, the ones that an earlier process saw.
    before: u64,
    meter: Meter,
    /// What the last groups lacked.
    masked: Window,
}

impl Run {
    fn open(stage: &mut Stage<'_>, handle: &Handle, tell: impl FnOnce(SocketAddr)) -> Result<Self> {
        let config = stage.config;
        let files = StaticFiles::read(stage.model_dir)?;
        let resume: Resume = config.run.resume.parse()?;
        let mut saver = Saver::open(handle, config, "", &stage.environment)?;
        let mut choice = saver.choice(resume)?;
        let crew = Crew::open(config, stage.model_dir, &stage.data.ids(), tell)?;
        let (mut learner, base) = make_learner(stage, &crew)?;
        let attempt = |r: &Reader| read(stage, &learner, base.as_ref(), r, handle);
        let from = take_up(&crew, (handle, saver.store()), Some(&mut choice), attempt)?;
        if let Some((info, meta)) = &from {
            let changed = allowed(info.step, &meta.config, config)?;
            tell_changes(&mut *stage.progress, info.step, choice.warnings(), &changed);
        }
        saver.resumed(from.as_ref().map(|(info, _)| info))?;
        let accounting = accounting(config, saver.term);
        let ids = stage.data.ids();
        let machine = match &from {
            Some((info, meta)) => {
                learner.go_on(&meta.stand)?;
                resumed(&learner, meta, info.step, accounting, ids)?
            }
            None => Experience::new(accounting, ids)?,
        };
        let machine = machine.set_aside_after(config.rollout.max_losses);
        let kind = if from.is_some() { "resumed" } else { "started" };
        stage.event(&json!({"kind": kind, "stage": "rl", "step": learner.step(), "term": saver.term}))?;
        let options = HostOptions {
            listen: config.learner.listen.clone(),
            sampling: sampling(config),
            stop: config.rollout.stop.clone(),
            vocab: learner.vlm().config().text.vocab_size as u32,
            fixed: config.run.deterministic.then_some(config.rollout.groups_per_lease),
            broadcast: match config.rollout.weight_sync {
                WeightSync::Grpc => None,
                WeightSync::Broadcast => Some(Broadcasting {
                    device: device(config)?,
                    limit: Duration::from_secs_f64(config.rollout.broadcast_s),
                }),
            },
        };
        let access = Access::of(config, Role::Learner)?;
        let host = Host::start_with(handle, options, access.clone(), machine, stage.data.clone())?;
        let meter = Meter::new(learner.settings().agreement_limit);
        host.serve_metrics(&config.learner.metrics_listen, meter.registry(), &access)?;
        saver.tell(meter.saves());
        let (best, responses) = from.map_or((None, 0), |(_, meta)| (meta.best, meta.seen));
        let masked = Window::new(config);
        Ok(Self {
            learner,
            crew,
            host,
            saver,
            files,
            base,
            best,
            best_saved: best,
            scores: BTreeMap::new(),
            responses,
            before: responses,
            meter,
            masked,
        })
    }

    /// Has all weights whole on this rank, for what needs them all.
    fn bring(&mut self) -> Result<()> {
        if self.crew.ranks.zero() == Zero::Parameters {
            self.crew.give(|| Order::Bring)?;
            self.learner.bring()?;
        }
        Ok(())
    }

    /// Publishes the parameters as they are now, in the kind of numbers that workers hold them in.
    fn publish(&mut self, kind: Kind) -> Result<()> {
        self.bring()?;
        let vlm = self.learner.vlm();
        let version = self.learner.step();
        let (named, adapters) = (vlm.named_parameters(), vlm.adapters());
        let freezing = &self.learner.settings().freezing;
        let changes = |name: &str| vlm.parameter(name).is_none() || (adapters.is_none() && freezing.ever(name));
        self.host.publish(&NewWeights { version, named, kind, adapters, changes: &changes })
    }

    fn train(&mut self, stage: &mut Stage<'_>) -> Result<Outcome> {
        let config = stage.config;
        let meter = self.meter.clone();
        let total = config.learner.steps;
        let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
        let mut outcome = Outcome::default();
        let begun = self.learner.step();
        if begun == 0 && total > 0 && config.learner.eval_every > 0 {
            self.bring()?;
            outcome.last = stage.evaluate("rl", self.learner.vlm_mut(), 0)?;
        }
        while self.learner.step() < total && !stage.cancel.is_cancelled() {
            let waiting = Instant::now();
            let Some(batch) = self.wait(stage)? else { break };
            let wait_ms = waiting.elapsed().as_secs_f64() * 1e3;
            if !config.run.dump_batch.is_empty() {
                let to = Path::new(&config.run.dump_batch).join(format!("step-{}", self.learner.step() + 1));
                self.crew.give(|| Order::Values(Crew::plain(&batch)))?;
                dump::write(&to, config, &self.learner, &batch)?;
            }
            if self.crew.give(|| Order::Update(Crew::plain(&batch)))? {
                // Another rank is to go: the run ends after this update.
                stage.cancel.cancel();
            }
            let spans = self.host.training(self.learner.step() + 1, &batch);
            let mut report = self.learner.update(&batch)?;
            drop(spans);
            (report.wait_ms, report.step_ms) = (wait_ms, waiting.elapsed().as_secs_f64() * 1e3 - wait_ms);
            report.stale_groups = self.host.stats().stale;
            let step = self.learner.step();
            self.host.settled(step, &report.fates(&batch))?;
            if step < total {
                meter.part("publish", || self.publish(wire_kind(config)))?;
            }
            self.tell(stage, &report, &batch)?;
            self.masked.take(step, &batch)?;
            let last = step == total;
            let evaluated = if last || due(config.learner.eval_every, step) {
                self.bring()?;
                meter.part("evaluate", || stage.evaluate("rl", self.learner.vlm_mut(), step))?
            } else {
                None
            };
            let better = self.judge(step, evaluated.as_ref());
            outcome.last = evaluated.or(outcome.last);
            if better || last || due(config.learner.checkpoint_every, step) {
                meter.part("save", || self.save(stage, better))?;
            }
        }
        (outcome.step, outcome.skipped) = (self.learner.step(), self.learner.counters().skipped);
        let pending = self.saver.wait(&mut self.crew)?;
        self.ended(stage, pending)?;
        if self.saver.last() != Some(outcome.step) {
            self.save(stage, false)?;
            let last = self.saver.wait_last(&mut self.crew)?;
            self.ended(stage, last.map(Ended::Saved))?;
        }
        self.bring()?;
        self.crew.give(|| Order::End)?;
        outcome.interrupted = outcome.step < total;
        Ok(outcome)
    }

    /// The next batch; `None` when the run is to stop.
    fn wait(&mut self, stage: &mut Stage<'_>) -> Result<Option<Vec<TrainGroup>>> {
        loop {
            if self.crew.hold()? {
                stage.cancel.cancel();
            }
            let polled = self.saver.poll(&mut self.crew)?;
            self.ended(stage, polled)?;
            let batch = self.host.next_batch(LOOK)?;
            for event in self.host.drain_events() {
                if let Event::Dropped { why, .. } = &event {
                    self.masked.dropped(why);
                }
                // Leases and submissions that go as they should are in the `train` events.
                if !matches!(event, Event::Leased { .. } | Event::Submitted { .. } | Event::Trained { .. }) {
                    stage.event(&with_kind("experience", &event)?)?;
                }
            }
            for sent in self.host.drain_broadcasts() {
                stage.event(&with_kind("broadcast", &sent)?)?;
            }
            if batch.is_some() || stage.cancel.is_cancelled() {
                return Ok(batch.filter(|_| !stage.cancel.is_cancelled()));
            }
        }
    }

    fn judge(&mut self, step: u64, found: Option<&Evaluation>) -> bool {
        let Some(score) = found.map(|e| e.score).filter(|s| s.is_finite()) else { return false };
        self.scores.insert(step, score);
        let better = self.best.is_none_or(|b| score > b.score);
        if better {
            self.best = Some(Best { step, score });
        }
        better
    }

    /// Tells what came of a save. Where it failed, the best step is again the best of those that there are checkpoints of.
    fn ended(&mut self, stage: &mut Stage<'_>, ended: Option<Ended>) -> Result<()> {
        let Some(ended) = ended else { return Ok(()) };
        match &ended {
            Ended::Saved(saved) => {
                let step = saved.step();
                let score = self.scores.remove(&step);
                if let Some(score) = score.filter(|s| self.best_saved.is_none_or(|b| *s > b.score)) {
                    self.best_saved = Some(Best { step, score });
                }
                let better = |b: Best| self.best_saved.is_some_and(|saved| saved.score > b.score);
                if self.best.is_some_and(better) {
                    self.best = self.best_saved;
                }
            }
            Ended::Failed(failed) => {
                self.scores.remove(&failed.step());
                if self.best.is_some_and(|b| b.step == failed.step()) {
                    self.best = self.best_saved;
                }
            }
        }
        stage.event(&ended.event("rl"))
    }

    fn save(&mut self, stage: &mut Stage<'_>, best: bool) -> Result<()> {
        let waiting = Instant::now();
        let before = self.saver.wait(&mut self.crew)?;
        self.ended(stage, before)?;
        let wait = waiting.elapsed();
        let (step, term) = (self.learner.step(), self.saver.term);
        self.crew.give(|| Order::Save { step, term })?;
        let copied = self.learner.snapshot(&self.saver.buffers)?;
        let (vlm, base) = (self.learner.vlm(), self.base.as_ref());
        let files = self.files.objects(vlm, base)?;
        let meta = Meta {
            experience: Some(self.host.snapshot()),
            best: self.best,
            adapters: SavedAdapters::of(vlm, base),
            ..Meta::new("rl", stage.config, self.learner.stand(), self.responses)
        };
        let save = Save { meta: &meta, best, alone: self.crew.ranks.size() == 1 };
        self.saver.save(step, (wait, copied), files, save)
    }

    fn tell(&mut self, stage: &mut Stage<'_>, report: &UpdateReport, batch: &[TrainGroup]) -> Result<()> {
        let mut event = with_kind("train", report)?;
        // By its term an event of a learner that was paused and overtaken is told from those of its successor.
        event["term"] = self.saver.term.into();
        // The metrics first: who reads the event finds it counted in them.
        self.meter.updated(report, batch, gpu_memory(self.learner.vlm().device()));
        stage.event(&event)?;
        let reading = &self.learner.settings().scoring.reading;
        kept::write(Path::new(&stage.config.run.dir), report.step, batch, &stage.data, reading)?;
        self.responses += report.responses as u64;
        let mut parts: Vec<(&str, f64)> = report.reward.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        parts.sort_by_key(|(k, _)| *k != "total");
        stage.progress.update(report.step, self.responses - self.before, &parts);
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
        stall_s: config.rollout.stall_s,
        silence_s: DEAD.as_secs_f64(),
        seed: config.run.seed,
        term,
        total_groups: Some(config.learner.steps * config.learner.groups as u64),
    }
}

/// This rank's learner, as the model directory has it, and what its adapters lie beside.
pub(crate) fn make_learner(stage: &Stage<'_>, crew: &Crew) -> Result<(Learner, Option<Base>)> {
    let config = stage.config;
    let load = || load_model_as(config, config.learner.threads, stage.model_dir, wire_kind(config), device(config)?);
    let mut vlm = load()?;
    let base = lora::adapt(&mut vlm, config)?.then(|| Base::read(stage.model_dir)).transpose()?;
    // Without its adapters the model is the reference.
    let reference = if config.learner.kl_coef > 0.0 && base.is_none() { Some(load()?) } else { None };
    let critic = if config.learner.critic == Critic::Separate { Some(load()?) } else { None };
    let banned = stage.data.preparer().tokenizer().special().banned.clone();
    let settings = StepSettings::new(config, &vlm, &banned);
    let mut learner = Learner::on(crew.ranks.clone(), Models { vlm, reference, critic }, settings)?;
    learner.align(&first_weights(stage, crew)?)?;
    Ok((learner, base))
}

/// Reads this rank's share of a checkpoint, if it fits.
pub(crate) fn read(
    stage: &Stage<'_>,
    learner: &Learner,
    base: Option<&Base>,
    reader: &Reader,
    handle: &Handle,
) -> Result<Meta> {
    let meta = Meta::read(reader, "rl", stage.config.run.seed)?;
    let critic = stage.config.learner.critic == Critic::Separate;
    meta.fits(reader, learner.vlm(), base, critic)?;
    allowed(reader.info().step, &meta.config, stage.config)?;
    learner.read(handle, reader)?;
    Ok(meta)
}

/// The weights of the model directory in fp32, where the learner computes with fewer digits.
fn first_weights(stage: &Stage<'_>, crew: &Crew) -> Result<Vec<(String, Tensor)>> {
    if wire_kind(stage.config) == Kind::Float || crew.ranks.rank() > 0 || stage.config.learner.lora.rank > 0 {
        return Ok(Vec::new());
    }
    let vlm = Vlm::load(stage.model_dir, Device::Cpu, Kind::Float)?;
    Ok(vlm.named_parameters().iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect())
}

fn resumed(
    learner: &Learner,
    meta: &Meta,
    step: u64,
    accounting: Settings,
    ids: Vec<String>,
) -> Result<Experience<TrainGroup>> {
    let snapshot = meta
        .experience
        .as_ref()
        .ok_or_else(|| LearnerError::State { step, what: "it does not say where the run stood in its data".into() })?;
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
