//! Section `[sft]`: stage 1, supervised fine-tuning.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Config, Optimizer, Parallel, SftLora};

/// Stage 1: supervised fine-tuning by cross-entropy on the reference answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sft {
    /// Number of updates; 0 skips stage 1.
    pub steps: u64,
    /// Images per update, over all ranks.
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// Optimiser of stage 1.
    pub optimizer: Optimizer,
    /// Updates between evaluations on the validation split; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Updates between checkpoints; 0 saves at the end only.
    pub checkpoint_every: u64,
    /// Parameters that stage 1 never trains: `vision_tower`, `merger`, `language_model`, or prefixes of parameter names.
    pub frozen: Vec<String>,
    /// Discards activations in the forward pass and recomputes them layer by layer in the backward pass (activation checkpointing): about a
    /// third more computation for a fraction of the memory.
    pub recompute: bool,
    /// Maximum number of positions in one forward and backward pass, padding included; larger batches are split into several passes, whose
    /// gradients are added up. Lower it to save memory.
    #[schemars(range(min = 1))]
    pub token_budget: usize,
    /// Packs several samples into one row without padding, with separate attention and positions; otherwise each sample has a row that is
    /// padded to the longest. The loss is the same.
    pub packing: bool,
    /// Low-rank adapters instead of full training.
    pub lora: SftLora,
    /// Phases of stage 1, one after another, each with its own optimiser. Empty: a single phase with the keys above. With phases, `steps` is
    /// the sum of theirs, and `optimizer`, `frozen` and `lora` are set in them.
    pub stage: Vec<SftPhase>,
    /// Ranks of stage 1, which are the processes `unveil sft`.
    pub parallel: Parallel,
}

/// A phase of stage 1. It starts from the model of the phase before it, with that one's adapters merged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SftPhase {
    /// Number of updates, at least 1.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Parameters that the phase does not train: `vision_tower`, `merger`, `language_model`, or prefixes of parameter names.
    #[serde(default)]
    pub frozen: Vec<String>,
    /// Low-rank adapters instead of full training.
    #[serde(default)]
    pub lora: SftLora,
    /// Optimiser of the phase; its schedule covers the steps of the phase.
    #[serde(default)]
    pub optimizer: Optimizer,
}

impl Config {
    /// Returns the phases of stage 1: those of `sft.stage`, or the single one that the other keys of `sft` describe.
    pub fn sft_phases(&self) -> Vec<SftPhase> {
        let s = &self.sft;
        if !s.stage.is_empty() {
            return s.stage.clone();
        }
        let optimizer = s.optimizer.clone();
        vec![SftPhase { steps: s.steps, frozen: s.frozen.clone(), lora: s.lora.clone(), optimizer }]
    }
}

impl Default for Sft {
    fn default() -> Self {
        Self {
            steps: 400,
            batch: 16,
            optimizer: Optimizer::default(),
            eval_every: 0,
            checkpoint_every: 0,
            frozen: Vec::new(),
            recompute: false,
            token_budget: 65_536,
            packing: false,
            lora: SftLora::default(),
            stage: Vec::new(),
            parallel: Parallel::default(),
        }
    }
}
