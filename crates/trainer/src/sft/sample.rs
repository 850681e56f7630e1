//! The data of an update of stage 1.

use std::sync::Arc;

use unveil_core::GroupInput;
use unveil_model::PackedGroup;

use crate::error::{Result, TrainerError};
use crate::micro_batch::BatchItem;

/// Images with their target answers.
#[derive(Debug, Clone, Default)]
pub struct SftBatch {
    /// Prompt and image of each sample.
    pub inputs: Vec<Arc<GroupInput>>,
    /// Answer tokens of each sample, end token included.
    pub targets: Vec<Vec<u32>>,
    /// Pass of the first sample.
    pub pass: u64,
}

impl SftBatch {
    /// Returns the samples.
    ///
    /// # Errors
    /// Returns [`TrainerError::Setting`] if the batch is empty or has not one answer per input.
    pub(super) fn samples(&self) -> Result<Vec<Sample>> {
        let inputs = self.inputs.len();
        let targets = self.targets.len();
        if inputs != targets || inputs == 0 {
            return Err(TrainerError::Setting(format!(
                "a batch of stage 1 has {inputs} inputs and {targets} answers: it needs one answer per input, and at least one input"
            )));
        }
        let mut samples = Vec::with_capacity(inputs);
        for (index, (input, target)) in self.inputs.iter().zip(&self.targets).enumerate() {
            let packed = PackedGroup { prompt: input.prompt.clone(), responses: vec![target.clone()] };
            samples.push(Sample { index, input: input.clone(), packed });
        }
        Ok(samples)
    }
}

/// One sample of a batch.
pub(super) struct Sample {
    /// Its position in the batch.
    index: usize,
    input: Arc<GroupInput>,
    packed: PackedGroup,
}

impl Sample {
    /// Returns a number that identifies the sample in the run, on whatever rank it is computed.
    pub(super) fn key(&self, seed: u64, step: u64) -> u64 {
        let mut key = seed;
        for part in [step, self.index as u64] {
            key = (key ^ part).wrapping_add(1).wrapping_mul(0xD129_42B3_F2F6_3A2B);
            key ^= key >> 31;
        }
        key
    }
}

impl BatchItem for Sample {
    fn packed(&self) -> &PackedGroup {
        &self.packed
    }

    fn input(&self) -> &GroupInput {
        &self.input
    }
}
