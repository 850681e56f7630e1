//! Stage 1: cross-entropy on the answers. Owns the order of the data, the update, and the stage's loop with evaluation and
//! checkpoints.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tch::{Kind, Tensor};
use unveil_checkpoint::{Reader, Resume};
use unveil_config::schema::Optimizer;
use unveil_model::{PackedGroup, Vlm};
use unveil_service::CancellationToken;

use crate::allowed::{allowed, tell as tell_changes};
use crate::batch::GroupInput;
use crate::crew::Crew;
use crate::dataset::Dataset;
use crate::error::{LearnerError, Result};
use crate::optim::{AdamW, lr_at};
use crate::policy::forward_groups;
use crate::resume::take_up;
use crate::saver::{Ended, Save, Saver};
use crate::snapshot::{Stand, State, held};
use crate::stage::{Outcome, Stage, load_model_as};
use crate::state::{Meta, StaticFiles};
use crate::step::{Counters, SKIP_LIMIT};

/// Batches that are prepared ahead.
const AHEAD: usize = 2;
/// How often a stage that waits for data looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);

/// Images with the answers to be learnt.
#[derive(Debug, Clone, Default)]
pub struct SftBatch {
    /// Prompt and image of each.
    pub inputs: Vec<Arc<GroupInput>>,
    /// Answer tokens of each, end token included.
    pub targets: Vec<Vec<u32>>,
    /// Pass of the first one.
    pub pass: u64,
}

/// Result of one update.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SftReport {
    /// Mean cross-entropy per answer token in nats; not finite when the step was skipped for it.
    pub loss: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Answer tokens.
    pub tokens: usize,
    /// Why the step was skipped.
    pub skipped: Option<String>,
}

/// A model in stage 1 with its optimiser.
pub struct SftTrainer {
    vlm: Vlm,
    optimizer: AdamW,
    options: Optimizer,
    total: u64,
    counters: Counters,
}

impl SftTrainer {
    /// Trains all of `vlm` for `total` updates.
    pub fn new(vlm: Vlm, options: &Optimizer, total: u64) -> Result<Self> {
        vlm.set_trainable(|_| true);
        let optimizer = AdamW::new(options, vlm.named_parameters())?;
        Ok(Self { vlm, optimizer, options: options.clone(), total, counters: Counters::default() })
    }

    /// The model.
    pub fn vlm(&self) -> &Vlm {
        &self.vlm
    }

    /// Updates so far, skipped ones among them.
    pub fn step(&self) -> u64 {
        self.counters.step
    }

    /// One update: mean cross-entropy over all answer tokens of the batch. A loss or gradient that is not finite skips the
    /// step.
    ///
    /// # Errors
    /// [`LearnerError::Skipped`] after [`SKIP_LIMIT`] skipped steps in a row; inputs that do not fit the model.
    pub fn update(&mut self, batch: &SftBatch) -> Result<SftReport> {
        let mut report = SftReport { lr: lr_at(&self.options, self.counters.step, self.total), ..Default::default() };
        report.tokens = batch.targets.iter().map(Vec::len).sum();
        self.optimizer.zero_grad()?;
        let loss = self.loss(batch)?;
        report.loss = loss.f_double_value(&[])?;
        let mut why = None;
        if report.loss.is_finite() {
            loss.f_backward()?;
            let gradient = self.optimizer.take_gradient()?;
            report.grad_norm = gradient.norm;
            if gradient.norm.is_finite() {
                self.optimizer.step(gradient, report.lr)?;
            } else {
                why = Some("a gradient is not finite");
            }
        } else {
            why = Some("the loss is not finite");
        }
        self.counters.step += 1;
        self.counters.updates = self.optimizer.updates();
        let Some(why) = why else {
            self.counters.skipped_in_a_row = 0;
            return Ok(report);
        };
        self.counters.skipped += 1;
        self.counters.skipped_in_a_row += 1;
        tracing::warn!(step = self.counters.step, why, "step skipped");
        if self.counters.skipped_in_a_row >= SKIP_LIMIT {
            let (step, in_a_row) = (self.counters.step, self.counters.skipped_in_a_row);
            return Err(LearnerError::Skipped { step, in_a_row, why: why.to_owned() });
        }
        report.skipped = Some(why.to_owned());
        Ok(report)
    }

    fn loss(&self, batch: &SftBatch) -> Result<Tensor> {
        let groups: Vec<PackedGroup> = batch
            .inputs
            .iter()
            .zip(&batch.targets)
            .map(|(i, t)| PackedGroup { prompt: i.prompt.clone(), responses: vec![t.clone()] })
            .collect();
        let (hidden, targets) = forward_groups(&self.vlm, &groups, batch.inputs.iter().map(|i| &**i))?;
        let logprobs = unveil_model::logprobs(&self.vlm.lm_head(&hidden), &targets, 1.0, &[]);
        Ok(-logprobs.f_mean(Kind::Float)?)
    }

    fn state(&self, part: (usize, usize)) -> Result<State<'_>> {
        let held = held(&self.optimizer, part, Vec::new())?;
        Ok(State { vlm: &self.vlm, optimizer: &self.optimizer, rank: 0, held })
    }

    fn stand(&self) -> Stand {
        Stand { counters: self.counters, counts: self.optimizer.counts(), kl: None }
    }
}

/// Which records update `step` sees: a function of (seed, step) alone. Each pass visits every record once, in an order of its
/// own. Returns (pass, record) pairs.
pub fn batch_indices(records: usize, batch: usize, seed: u64, step: u64) -> Vec<(u64, usize)> {
    let n = records.max(1) as u64;
    let mut order: (Option<u64>, Vec<usize>) = (None, Vec::new());
    (step * batch as u64..(step + 1) * batch as u64)
        .map(|k| {
            let pass = k / n;
            if order.0 != Some(pass) {
                let mut all: Vec<usize> = (0..n as usize).collect();
                let mut key = [0u8; 32];
                key[..8].copy_from_slice(&seed.to_le_bytes());
                key[8..16].copy_from_slice(&pass.to_le_bytes());
                key[16..24].copy_from_slice(b"sft pass");
                all.shuffle(&mut ChaCha8Rng::from_seed(key));
                order = (Some(pass), all);
            }
            (pass, order.1[(k % n) as usize])
        })
        .collect()
}

/// Prepares batches on a thread of its own, from update `first` on; it ends when the receiver is dropped, or with a stop.
fn prefetch(
    data: Arc<Dataset>,
    (batch, seed): (usize, u64),
    steps: Range<u64>,
    cancel: CancellationToken,
) -> Result<Receiver<Result<SftBatch>>> {
    let (send, receive) = sync_channel(AHEAD);
    let work = move || {
        for step in steps {
            let Some(made) = make_batch(&data, batch, seed, step, &cancel).transpose() else { return };
            let failed = made.is_err();
            if send.send(made).is_err() || failed {
                return;
            }
        }
    };
    std::thread::Builder::new().name("sft-data".into()).spawn(work).map_err(LearnerError::io("thread sft-data"))?;
    Ok(receive)
}

/// The batch of a step; none where a stop came before it was whole.
fn make_batch(
    data: &Dataset,
    batch: usize,
    seed: u64,
    step: u64,
    cancel: &CancellationToken,
) -> Result<Option<SftBatch>> {
    let mut out = SftBatch::default();
    for (k, (pass, index)) in batch_indices(data.len(), batch, seed, step).into_iter().enumerate() {
        if cancel.is_cancelled() {
            return Ok(None);
        }
        let item = data.item(index, pass, false)?;
        if k == 0 {
            out.pass = pass;
        }
        out.inputs.push(item.input.clone());
        out.targets.push(item.target.clone());
    }
    Ok(Some(out))
}

/// The next batch; none where the stage is to stop.
fn next_batch(batches: &Receiver<Result<SftBatch>>, cancel: &CancellationToken) -> Result<Option<SftBatch>> {
    loop {
        let got = batches.recv_timeout(LOOK);
        if cancel.is_cancelled() {
            return Ok(None);
        }
        match got {
            Ok(batch) => return batch.map(Some),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(LearnerError::Lost("the data thread")),
        }
    }
}

/// Runs stage 1 to its end, or to an interrupt. Checkpoints go to the prefix `sft` under the run's; the model after the last
/// update is written to [`Stage::out`]. Call it from a thread that runs no tokio runtime.
///
/// # Errors
/// See [`LearnerError`].
pub fn run_sft(mut stage: Stage<'_>) -> Result<Outcome> {
    let config = stage.config;
    let (seed, total) = (config.run.seed, config.sft.steps);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(LearnerError::io("runtime"))?;
    let files = StaticFiles::read(stage.model_dir)?;
    let mut trainer = SftTrainer::new(
        load_model_as(
            config,
            config.run.threads,
            stage.model_dir,
            Kind::Float,
            unveil_model::device(&config.run.device)?,
        )?,
        &config.sft.optimizer,
        total,
    )?;
    // A step number speaks of stage 2, which needs a stage 1 that is whole.
    let resume = if config.run.resume == "never" { Resume::Never } else { Resume::Auto };
    let mut saver = Saver::open(runtime.handle(), config, "sft", &stage.environment)?;
    let mut crew = Crew::solo();
    let attempt = |reader: &Reader| {
        let meta = Meta::read(reader, "sft", seed)?;
        meta.fits(reader, &trainer.vlm, None, false)?;
        allowed(reader.info().step, &meta.config, config)?;
        trainer.state((0, 1))?.read(runtime.handle(), reader)?;
        Ok(meta)
    };
    let mut choice = saver.choice(resume)?;
    let from = take_up(&crew, (runtime.handle(), saver.store()), Some(&mut choice), attempt)?;
    if let Some((info, meta)) = &from {
        let changed = allowed(info.step, &meta.config, config)?;
        tell_changes(&mut *stage.progress, info.step, choice.warnings(), &changed);
    }
    saver.resumed(from.as_ref().map(|(info, _)| info))?;
    let mut images = 0u64;
    if let Some((_, meta)) = &from {
        trainer.optimizer.go_on(meta.stand.counters.updates, &meta.stand.counts)?;
        (trainer.counters, images) = (meta.stand.counters, meta.seen);
    }
    let kind = if from.is_some() { "resumed" } else { "started" };
    stage.event(&json!({"kind": kind, "stage": "sft", "step": trainer.step()}))?;
    let save = |saver: &mut Saver, crew: &mut Crew, trainer: &SftTrainer, images: u64| {
        let waiting = Instant::now();
        let before = saver.wait(crew)?;
        let wait = waiting.elapsed();
        let copied = trainer.state((0, 1))?.copy(&saver.buffers)?;
        let meta = Meta::new("sft", config, trainer.stand(), images);
        let save = Save { meta: &meta, best: false, alone: true };
        saver.save(trainer.step(), (wait, copied), files.objects(&trainer.vlm, None)?, save)?;
        Ok::<_, LearnerError>(before)
    };
    let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
    let steps = trainer.step()..total;
    let batches = prefetch(stage.data.clone(), (config.sft.batch, seed), steps, stage.cancel.clone())?;
    let mut outcome = Outcome::default();
    let (started, before) = (Instant::now(), images);
    while trainer.step() < total && !stage.cancel.is_cancelled() {
        let waiting = Instant::now();
        let Some(batch) = next_batch(&batches, &stage.cancel)? else { break };
        let wait_ms = waiting.elapsed().as_secs_f64() * 1e3;
        let report = trainer.update(&batch)?;
        let step = trainer.step();
        images += batch.inputs.len() as u64;
        let rate = (images - before) as f64 / started.elapsed().as_secs_f64().max(1e-9);
        let step_ms = waiting.elapsed().as_secs_f64() * 1e3 - wait_ms;
        let mut event = json!({
            "kind": "sft", "step": step, "pass": batch.pass, "loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm,
            "tokens": report.tokens, "images_per_s": rate, "wait_ms": wait_ms, "step_ms": step_ms, "skipped_total": trainer.counters.skipped,
        });
        if let Some(why) = &report.skipped {
            event["skipped"] = json!(why);
        }
        stage.event(&event)?;
        stage.progress.update(step, images - before, &[("loss", report.loss)]);
        if step < total && due(config.sft.eval_every, step) {
            outcome.last = stage.evaluate("sft", &mut trainer.vlm, step)?;
        }
        if step < total
            && due(config.sft.checkpoint_every, step)
            && let Some(saved) = save(&mut saver, &mut crew, &trainer, images)?
        {
            stage.event(&saved.event("sft"))?;
        }
    }
    drop(batches);
    let mut written = saver.wait(&mut crew)?;
    if let Some(ended) = &written {
        stage.event(&ended.event("sft"))?;
    }
    if saver.last() != Some(trainer.step()) {
        save(&mut saver, &mut crew, &trainer, images)?;
        written = saver.wait_last(&mut crew)?.map(Ended::Saved);
        if let Some(ended) = &written {
            stage.event(&ended.event("sft"))?;
        }
    }
    (outcome.step, outcome.skipped) = (trainer.step(), trainer.counters.skipped);
    outcome.interrupted = trainer.step() < total;
    if outcome.interrupted {
        return Ok(outcome);
    }
    if written.is_some() {
        let step = trainer.step();
        outcome.last = stage.evaluate("sft", &mut trainer.vlm, step)?.or(outcome.last);
    }
    saver.export(trainer.step(), stage.out)?;
    outcome.exported = Some(trainer.step());
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_visits_each_record_once() {
        let all: Vec<(u64, usize)> = (0..7).flat_map(|s| batch_indices(10, 4, 3, s)).collect();
        for pass in 0..2 {
            let mut seen: Vec<usize> = all.iter().filter(|(p, _)| *p == pass).map(|(_, i)| *i).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        let pass = |p| all.iter().filter(|(q, _)| *q == p).map(|(_, i)| *i).collect::<Vec<_>>();
        assert_ne!(pass(0), pass(1));
        assert_ne!(batch_indices(10, 4, 3, 0), batch_indices(10, 4, 4, 0));
    }
}
