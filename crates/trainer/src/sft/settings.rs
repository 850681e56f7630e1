//! The settings of stage 1, collected from the configuration so that a test can set them by hand.

use unveil_config::Config;
use unveil_config::schema::Optimizer;

use crate::freeze::Freezing;
use crate::micro_batch::Division;

/// All settings of an update of stage 1.
#[derive(Debug, Clone)]
pub struct SftSettings {
    /// Settings of the optimiser.
    pub optimizer: Optimizer,
    /// Number of updates before this trainer's first one.
    pub first_step: u64,
    /// Updates of this trainer, which define the learning-rate schedule.
    pub total_steps: u64,
    /// Parameters that are frozen.
    pub freezing: Freezing,
    /// Whether activations are recomputed in the backward pass.
    pub recompute: bool,
    /// Maximum of positions per forward pass, padding included.
    pub token_budget: usize,
    /// Whether samples share a row instead of being padded to the longest.
    pub packing: bool,
    /// Probability with which an input of an adapter is dropped.
    pub dropout: f64,
    /// Seed of the run, for dropout.
    pub seed: u64,
}

impl SftSettings {
    /// Returns settings that train all parameters for `total_steps` updates, with a single forward pass per rank and update.
    pub fn new(optimizer: Optimizer, total_steps: u64) -> Self {
        let freezing = Freezing::always("sft.frozen", &[]);
        Self {
            optimizer,
            first_step: 0,
            total_steps,
            freezing,
            recompute: false,
            token_budget: usize::MAX,
            packing: false,
            dropout: 0.0,
            seed: 0,
        }
    }

    /// Reads the section `[sft]` for a trainer whose updates are those from `first_step` to `sft.steps`.
    pub fn from_config(config: &Config, first_step: u64) -> Self {
        let s = &config.sft;
        Self {
            freezing: Freezing::always("sft.frozen", &s.frozen),
            recompute: s.recompute,
            token_budget: s.token_budget,
            packing: s.packing,
            dropout: s.lora.dropout,
            seed: config.run.seed,
            first_step,
            ..Self::new(s.optimizer.clone(), s.steps.saturating_sub(first_step))
        }
    }

    /// Returns how samples are divided into micro-batches.
    pub(crate) fn division(&self) -> Division {
        if self.packing { Division::Packed } else { Division::Padded }
    }
}
