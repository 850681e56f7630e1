//! A phase of stage 1, instruction tuning: its parts of the loop that both stages share, with batches that are prepared ahead.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde_json::json;
use unveil_checkpoint::Resume;
use unveil_service::CancellationToken;
use unveil_trainer::{SftBatch, SftTrainer};

use crate::checkpoint_meta::CheckpointMeta;
use crate::dataset::Dataset;
use crate::error::{LearnerError, Result};
use crate::rank_control::RankControl;
use crate::sft_batch::{SftUpdate, batch_indices};
use crate::sft_phase::Phase;
use crate::stage::{Outcome, Stage};
use crate::stage_loop::{StageLoop, StageParts, StageStart};
use crate::stage_plan::StagePlan;
use crate::threads::{spawn, start_runtime};
use crate::trainer_start::make_sft_trainer;

/// Batches prepared ahead of the update.
const PREFETCHED_BATCHES: usize = 2;
/// Interval at which a wait for data checks for cancellation.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Prepares the batches of `steps` on a thread that ends when the receiver is dropped or the stage is cancelled.
fn prefetch(
    data: Arc<Dataset>,
    (batch, seed): (usize, u64),
    steps: Range<u64>,
    cancel: CancellationToken,
) -> Result<Receiver<Result<SftBatch>>> {
    let (send, receive) = sync_channel(PREFETCHED_BATCHES);
    let work = move || {
        for step in steps {
            let Some(prepared) = make_batch(&data, batch, seed, step, &cancel).transpose() else { return };
            let failed = prepared.is_err();
            if send.send(prepared).is_err() || failed {
                return;
            }
        }
    };
    spawn("sft-data", work)?;
    Ok(receive)
}

/// Prepares the batch of an update; returns `None` if cancelled meanwhile.
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

/// Runs a phase on rank 0 until it ends or is interrupted, and exports its model; returns the control of the ranks for the next one.
pub(crate) fn run_phase(stage: Stage<'_>, phase: &Phase, control: RankControl) -> Result<(Outcome, RankControl)> {
    let runtime = start_runtime(1)?;
    // A step number refers to stage 2, which requires a complete stage 1.
    let resume = if stage.config.run.resume == "never" { Resume::Never } else { Resume::Auto };
    let start = StageStart::claim(&stage, plan(phase), resume, runtime.handle())?;
    let trainer = make_sft_trainer(&stage, &control, phase.first_step)?;
    let (mut run, mut parts) = start.resume(stage, control, trainer, SftParts::open)?;
    let mut outcome = run.train(&mut parts)?;
    if !outcome.interrupted {
        outcome = run.export(outcome)?;
    }
    Ok((outcome, run.into_control()))
}

/// Returns the plan of a phase of stage 1.
pub(crate) fn plan(phase: &Phase) -> StagePlan {
    let config = &phase.config;
    StagePlan {
        name: "sft",
        prefix: phase.prefix,
        total: config.sft.steps,
        eval_every: config.sft.eval_every,
        checkpoint_every: config.sft.checkpoint_every,
        evaluates_start: false,
        exports_best: !config.eval.best.is_empty(),
        logs_term: false,
        critic: false,
    }
}

/// The parts of stage 1: prepared batches, and the number of images.
struct SftParts {
    batches: Receiver<Result<SftBatch>>,
    images: u64,
    /// Images counted before this process resumed the run.
    images_before: u64,
    started: Instant,
}

impl SftParts {
    /// Starts preparing the batches of the remaining updates.
    fn open(run: &StageLoop<'_, SftTrainer>, meta: Option<&CheckpointMeta>) -> Result<Self> {
        let config = run.stage.config;
        let steps = run.trainer.step()..config.sft.steps;
        let order = (config.sft.batch, config.run.seed);
        let batches = prefetch(run.stage.data.clone(), order, steps, run.stage.cancel.clone())?;
        let images = meta.map_or(0, |m| m.seen);
        Ok(Self { batches, images, images_before: images, started: Instant::now() })
    }

    /// Waits for the next batch; returns `None` if the stage was cancelled.
    fn next_batch(&self, run: &mut StageLoop<'_, SftTrainer>) -> Result<Option<SftBatch>> {
        loop {
            let received = self.batches.recv_timeout(POLL_INTERVAL);
            run.keep_ranks()?;
            if run.stage.cancel.is_cancelled() {
                return Ok(None);
            }
            match received {
                Ok(batch) => return batch.map(Some),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(LearnerError::ThreadEnded("the data thread")),
            }
        }
    }
}

impl StageParts for SftParts {
    type Trainer = SftTrainer;

    fn update(&mut self, run: &mut StageLoop<'_, SftTrainer>) -> Result<bool> {
        let wait_start = Instant::now();
        let Some(batch) = self.next_batch(run)? else { return Ok(false) };
        let wait_ms = wait_start.elapsed().as_secs_f64() * 1e3;
        let config = run.stage.config;
        let records = run.stage.data.len();
        let step = run.trainer.step();
        let order = || batch_indices(records, config.sft.batch, config.run.seed, step);
        run.send_batch(|| SftUpdate::new(&batch, &order()))?;
        let report = run.trainer.update(&batch)?;
        let step = run.trainer.step();
        self.images += batch.inputs.len() as u64;
        let done = self.images - self.images_before;
        let rate = done as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        let step_ms = wait_start.elapsed().as_secs_f64() * 1e3 - wait_ms;
        let mut event = json!({
            "kind": "sft", "step": step, "pass": batch.pass, "loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm,
            "tokens": report.tokens, "padding": report.padding, "images_per_s": rate, "wait_ms": wait_ms, "step_ms": step_ms,
            "skipped_total": run.trainer.skipped(),
        });
        if let Some(why) = &report.skipped {
            event["skipped"] = json!(why);
        }
        run.stage.event(&event)?;
        run.stage.progress.update(step, done, &[("loss", report.loss)]);
        Ok(true)
    }

    fn add_to_checkpoint(&self, meta: &mut CheckpointMeta) {
        meta.seen = self.images;
    }
}
