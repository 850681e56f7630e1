//! Stage 1, instruction tuning: the order of the data, and its parts of the loop that both stages share.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tch::Kind;
use unveil_checkpoint::Resume;
use unveil_config::{Config, SFT_PREFIX};
use unveil_service::CancellationToken;
use unveil_trainer::{SftBatch, SftTrainer, load_model};

use crate::checkpoint_meta::CheckpointMeta;
use crate::dataset::Dataset;
use crate::error::{LearnerError, Result};
use crate::rank_control::RankControl;
use crate::stage::{Outcome, Stage};
use crate::stage_loop::{StageLoop, StageParts, StageStart};
use crate::stage_plan::StagePlan;
use crate::threads::{spawn, start_runtime};

/// Batches prepared ahead of the update.
const PREFETCHED_BATCHES: usize = 2;
/// Interval at which a wait for data checks for cancellation.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Returns the samples of update `step` as (pass, record index) pairs, a function of `seed` and `step` only. Each pass
/// visits every record once, in its own order.
fn batch_indices(records: usize, batch: usize, seed: u64, step: u64) -> Vec<(u64, usize)> {
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

/// Runs stage 1 until it ends or is interrupted. Checkpoints are saved under the prefix `sft` of the run; the model
/// after the last update is written to [`Stage::out`]. Must not be called within a tokio runtime.
///
/// # Errors
/// See [`LearnerError`].
pub fn run_sft(stage: Stage<'_>) -> Result<Outcome> {
    let config = stage.config;
    let runtime = start_runtime(1)?;
    let device = unveil_model::device(&config.run.device)?;
    let vlm = load_model(config, config.run.threads, stage.model_dir, Kind::Float, device)?;
    let trainer = SftTrainer::new(vlm, &config.sft.optimizer, config.sft.steps)?;
    // A step number refers to stage 2, which requires a complete stage 1.
    let resume = if config.run.resume == "never" { Resume::Never } else { Resume::Auto };
    let start = StageStart::claim(&stage, plan(config), resume, runtime.handle())?;
    let (mut run, mut parts) = start.resume(stage, RankControl::solo(), (trainer, None), SftParts::open)?;
    let outcome = run.train(&mut parts)?;
    if outcome.interrupted {
        return Ok(outcome);
    }
    run.export(outcome)
}

/// Returns the plan of stage 1.
fn plan(config: &Config) -> StagePlan {
    StagePlan {
        name: "sft",
        prefix: SFT_PREFIX,
        total: config.sft.steps,
        eval_every: config.sft.eval_every,
        checkpoint_every: config.sft.checkpoint_every,
        evaluates_start: false,
        exports_best: false,
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
        let report = run.trainer.update(&batch)?;
        let step = run.trainer.step();
        self.images += batch.inputs.len() as u64;
        let done = self.images - self.images_before;
        let rate = done as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        let step_ms = wait_start.elapsed().as_secs_f64() * 1e3 - wait_ms;
        let mut event = json!({
            "kind": "sft", "step": step, "pass": batch.pass, "loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm,
            "tokens": report.tokens, "images_per_s": rate, "wait_ms": wait_ms, "step_ms": step_ms,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pass_visits_every_record_once() {
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
