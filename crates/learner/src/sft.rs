//! Stage 1, instruction tuning: the order of the data, and the training loop with evaluation and checkpoints.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tch::Kind;
use unveil_checkpoint::{Reader, Resume};
use unveil_service::CancellationToken;
use unveil_trainer::{SftBatch, SftTrainer, load_model};

use crate::checkpoint_meta::{CheckpointMeta, StaticFiles};
use crate::dataset::Dataset;
use crate::error::{LearnerError, Result};
use crate::rank_control::RankControl;
use crate::resume::compatibility::{allowed_changes, report_changes};
use crate::resume::resume_on_all_ranks;
use crate::saver::{Save, SaveResult, Saver};
use crate::snapshot::{copy_to_host, read_state};
use crate::stage::{Outcome, Stage};

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
    std::thread::Builder::new().name("sft-data".into()).spawn(work).map_err(LearnerError::io("thread sft-data"))?;
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

/// Waits for the next batch; returns `None` if the stage was cancelled.
fn next_batch(batches: &Receiver<Result<SftBatch>>, cancel: &CancellationToken) -> Result<Option<SftBatch>> {
    loop {
        let received = batches.recv_timeout(POLL_INTERVAL);
        if cancel.is_cancelled() {
            return Ok(None);
        }
        match received {
            Ok(batch) => return batch.map(Some),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(LearnerError::ThreadEnded("the data thread")),
        }
    }
}

/// Runs stage 1 until it ends or is interrupted. Checkpoints are saved under the prefix `sft` of the run; the model
/// after the last update is written to [`Stage::out`]. Must not be called within a tokio runtime.
///
/// # Errors
/// See [`LearnerError`].
pub fn run_sft(mut stage: Stage<'_>) -> Result<Outcome> {
    let config = stage.config;
    let seed = config.run.seed;
    let total = config.sft.steps;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(LearnerError::io("runtime"))?;
    let files = StaticFiles::read(stage.model_dir)?;
    let mut trainer = SftTrainer::new(
        load_model(
            config,
            config.run.threads,
            stage.model_dir,
            Kind::Float,
            unveil_model::device(&config.run.device)?,
        )?,
        &config.sft.optimizer,
        total,
    )?;
    // A step number refers to stage 2, which requires a complete stage 1.
    let resume = if config.run.resume == "never" { Resume::Never } else { Resume::Auto };
    let mut saver = Saver::open(runtime.handle(), config, "sft", &stage.environment)?;
    let mut control = RankControl::solo();
    let attempt = |reader: &Reader| {
        let meta = CheckpointMeta::read(reader, "sft", seed)?;
        meta.check_fits(reader, trainer.vlm(), None, false)?;
        allowed_changes(reader.info().step, &meta.config, config)?;
        read_state(&trainer.local_state()?, runtime.handle(), reader)?;
        Ok(meta)
    };
    let mut candidates = saver.resume_candidates(resume)?;
    let resumed = resume_on_all_ranks(&control, (runtime.handle(), saver.store()), Some(&mut candidates), attempt)?;
    if let Some((info, meta)) = &resumed {
        let changed = allowed_changes(info.step, &meta.config, config)?;
        report_changes(&mut *stage.progress, info.step, candidates.warnings(), &changed);
    }
    saver.record_resume(resumed.as_ref().map(|(info, _)| info))?;
    let mut images = 0u64;
    if let Some((_, meta)) = &resumed {
        trainer.resume_from(&meta.progress)?;
        images = meta.seen;
    }
    let kind = if resumed.is_some() { "resumed" } else { "started" };
    stage.event(&json!({"kind": kind, "stage": "sft", "step": trainer.step()}))?;
    let save = |saver: &mut Saver, control: &mut RankControl, trainer: &SftTrainer, images: u64| {
        let wait_start = Instant::now();
        let previous = saver.wait(control)?;
        let wait = wait_start.elapsed();
        let copy = copy_to_host(&trainer.local_state()?, &saver.buffers)?;
        let meta = CheckpointMeta::new("sft", config, trainer.progress(), images);
        let save = Save { meta: &meta, best: false, is_only_rank: true };
        saver.save(trainer.step(), (wait, copy), files.objects(trainer.vlm(), None)?, save)?;
        Ok::<_, LearnerError>(previous)
    };
    let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
    let steps = trainer.step()..total;
    let batches = prefetch(stage.data.clone(), (config.sft.batch, seed), steps, stage.cancel.clone())?;
    let mut outcome = Outcome::default();
    let started = Instant::now();
    let images_before = images;
    while trainer.step() < total && !stage.cancel.is_cancelled() {
        let wait_start = Instant::now();
        let Some(batch) = next_batch(&batches, &stage.cancel)? else { break };
        let wait_ms = wait_start.elapsed().as_secs_f64() * 1e3;
        let report = trainer.update(&batch)?;
        let step = trainer.step();
        images += batch.inputs.len() as u64;
        let rate = (images - images_before) as f64 / started.elapsed().as_secs_f64().max(1e-9);
        let step_ms = wait_start.elapsed().as_secs_f64() * 1e3 - wait_ms;
        let mut event = json!({
            "kind": "sft", "step": step, "pass": batch.pass, "loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm,
            "tokens": report.tokens, "images_per_s": rate, "wait_ms": wait_ms, "step_ms": step_ms, "skipped_total": trainer.skipped(),
        });
        if let Some(why) = &report.skipped {
            event["skipped"] = json!(why);
        }
        stage.event(&event)?;
        stage.progress.update(step, images - images_before, &[("loss", report.loss)]);
        if step < total && due(config.sft.eval_every, step) {
            outcome.last = stage.evaluate("sft", trainer.vlm_mut(), step)?;
        }
        if step < total
            && due(config.sft.checkpoint_every, step)
            && let Some(saved) = save(&mut saver, &mut control, &trainer, images)?
        {
            stage.event(&saved.event("sft"))?;
        }
    }
    drop(batches);
    let mut last_save = saver.wait(&mut control)?;
    if let Some(result) = &last_save {
        stage.event(&result.event("sft"))?;
    }
    if saver.last() != Some(trainer.step()) {
        save(&mut saver, &mut control, &trainer, images)?;
        last_save = saver.wait_last(&mut control)?.map(SaveResult::Saved);
        if let Some(result) = &last_save {
            stage.event(&result.event("sft"))?;
        }
    }
    (outcome.step, outcome.skipped) = (trainer.step(), trainer.skipped());
    outcome.interrupted = trainer.step() < total;
    if outcome.interrupted {
        return Ok(outcome);
    }
    if last_save.is_some() {
        let step = trainer.step();
        outcome.last = stage.evaluate("sft", trainer.vlm_mut(), step)?.or(outcome.last);
    }
    saver.export(trainer.step(), stage.out)?;
    outcome.exported = Some(trainer.step());
    Ok(outcome)
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
