//! Batches of stage 1: their order, and the form in which rank 0 sends them to the other ranks, which read the images of the samples that
//! they compute from their own data.

use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use unveil_core::{Grid, GridThw, GroupInput, Prompt};
use unveil_trainer::{SftBatch, SftTrainer};

use crate::error::{LearnerError, Result};
use crate::parallel::{map_in_parallel, thread_count};
use crate::stage::Stage;

/// Returns the samples of update `step` as (pass, record index) pairs, a function of `seed` and `step` only. Each pass
/// visits every record once, in its own order.
pub(crate) fn batch_indices(records: usize, batch: usize, seed: u64, step: u64) -> Vec<(u64, usize)> {
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

/// The command to update with a batch, without its pixels.
#[derive(Serialize, Deserialize)]
pub(crate) struct SftUpdate {
    samples: Vec<SampleHeader>,
}

/// A sample without its pixels.
#[derive(Serialize, Deserialize)]
struct SampleHeader {
    pass: u64,
    /// Index of the record.
    index: usize,
    prompt: Vec<u32>,
    grids: Vec<GridThw>,
    target: Vec<u32>,
}

impl SftUpdate {
    /// Creates the command to update with `batch`, whose samples are those of `order`.
    pub(crate) fn new(batch: &SftBatch, order: &[(u64, usize)]) -> Self {
        let mut samples = Vec::with_capacity(order.len());
        for ((input, target), (pass, index)) in batch.inputs.iter().zip(&batch.targets).zip(order) {
            samples.push(SampleHeader {
                pass: *pass,
                index: *index,
                prompt: input.prompt.tokens.clone(),
                grids: input.prompt.grids.clone(),
                target: target.clone(),
            });
        }
        Self { samples }
    }

    /// Executes the command on a rank other than rank 0.
    ///
    /// # Errors
    /// Returns [`LearnerError::PromptDiffers`] or [`LearnerError::RecordIndex`] if this rank has other data than rank 0, and
    /// [`LearnerError::Trainer`] if the trainer cannot continue.
    pub(crate) fn execute(self, stage: &Stage<'_>, trainer: &mut SftTrainer) -> Result<()> {
        let batch = self.rebuild(stage, trainer)?;
        trainer.update(&batch)?;
        Ok(())
    }

    /// Rebuilds the batch of rank 0, with the pixels of the samples that this rank computes.
    fn rebuild(self, stage: &Stage<'_>, trainer: &SftTrainer) -> Result<SftBatch> {
        let records = stage.data.records();
        let mut batch = SftBatch { pass: self.samples.first().map_or(0, |s| s.pass), ..SftBatch::default() };
        let mut order = Vec::with_capacity(self.samples.len());
        for sample in self.samples {
            let SampleHeader { pass, index, prompt, grids, target } = sample;
            let record = records.get(index).ok_or(LearnerError::RecordIndex { index, count: records.len() })?;
            batch.inputs.push(Arc::new(GroupInput {
                record: record.clone(),
                image_size: (0, 0),
                prompt: Prompt { tokens: prompt, grids },
                patches: Vec::new(),
                merged: Grid { rows: 0, cols: 0 },
                encoded: Default::default(),
            }));
            batch.targets.push(target);
            order.push((pass, index));
        }
        let local = trainer.local_samples(&batch)?;
        let data = &stage.data;
        let inputs = map_in_parallel(&local, thread_count(stage.config.run.threads), |i| {
            let (pass, index) = order[*i];
            let item = data.item(index, pass, false)?;
            if item.input.prompt != batch.inputs[*i].prompt || item.target != batch.targets[*i] {
                return Err(LearnerError::PromptDiffers { record: item.input.record.id.clone() });
            }
            Ok(item.input.clone())
        })?;
        for (i, input) in local.into_iter().zip(inputs) {
            batch.inputs[i] = input;
        }
        Ok(batch)
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
