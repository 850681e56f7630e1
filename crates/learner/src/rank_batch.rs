//! Batches of stage 2 between ranks: the commands that rank 0 sends, and their execution on the other ranks, which read the pixels of
//! the groups that they compute from their own data.

use serde::{Deserialize, Serialize};
use unveil_core::{Record, TrainGroup};
use unveil_trainer::PolicyTrainer;
use unveil_trainer::wire::GroupDump;

use crate::error::{LearnerError, Result};
use crate::parallel::{map_in_parallel, thread_count};
use crate::stage::Stage;

/// A command about a batch that the other ranks execute.
#[derive(Serialize, Deserialize)]
pub(crate) enum BatchCommand {
    /// Updates the model with it.
    Update(Vec<GroupDump>),
    /// Computes its values for a dump.
    ComputeValues(Vec<GroupDump>),
}

impl BatchCommand {
    /// Creates the command to update with `batch`.
    pub(crate) fn update(batch: &[TrainGroup]) -> Self {
        Self::Update(to_wire(batch))
    }

    /// Creates the command to compute the values of `batch`.
    pub(crate) fn compute_values(batch: &[TrainGroup]) -> Self {
        Self::ComputeValues(to_wire(batch))
    }

    /// Executes the command on a rank other than rank 0.
    ///
    /// # Errors
    /// Returns [`LearnerError::RecordMissing`] or [`LearnerError::PromptDiffers`] if this rank has other data than rank 0, and
    /// [`LearnerError::Trainer`] if the trainer cannot continue.
    pub(crate) fn execute(self, stage: &Stage<'_>, trainer: &mut PolicyTrainer) -> Result<()> {
        match self {
            Self::Update(groups) => {
                let batch = rebuild_batch(stage, trainer, groups)?;
                trainer.update(&batch)?;
            }
            Self::ComputeValues(groups) => {
                let batch = rebuild_batch(stage, trainer, groups)?;
                trainer.compute_values(&batch)?;
            }
        }
        Ok(())
    }
}

/// Converts a batch to the form that is sent to other ranks.
fn to_wire(batch: &[TrainGroup]) -> Vec<GroupDump> {
    batch.iter().map(|g| GroupDump::new(g, None)).collect()
}

/// Rebuilds the batch of rank 0, with the pixels of the groups that this rank computes.
fn rebuild_batch(stage: &Stage<'_>, trainer: &PolicyTrainer, groups: Vec<GroupDump>) -> Result<Vec<TrainGroup>> {
    let mut batch: Vec<TrainGroup> = groups.into_iter().map(|g| g.into_train_group(Vec::new())).collect();
    let local = trainer.local_groups(&batch);
    let data = &stage.data;
    // Decoding takes longer than anything else that the device would wait for.
    let inputs = map_in_parallel(&local, thread_count(stage.config.learner.threads), |i| {
        let group = &batch[*i];
        let Record { id, .. } = &group.input.record;
        let index = data.index(id).ok_or_else(|| LearnerError::RecordMissing { record: id.clone() })?;
        let item = data.item(index, group.id.pass, false)?;
        if item.input.prompt != group.input.prompt {
            return Err(LearnerError::PromptDiffers { record: id.clone() });
        }
        Ok(item.input.clone())
    })?;
    for (i, input) in local.into_iter().zip(inputs) {
        batch[i].input = input;
    }
    Ok(batch)
}
