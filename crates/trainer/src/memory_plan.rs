//! Memory needed on a rank, by use.

use std::fmt;

/// Bytes needed on one rank, by use. Activations are an estimate.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemoryPlan {
    /// Weights of all models on the rank.
    pub weights: u64,
    /// Master weights and moments.
    pub optimizer: u64,
    /// Gradients.
    pub gradients: u64,
    /// Activations that the largest forward pass keeps for its backward pass, logits included.
    pub activations: u64,
    /// Padded positions of that forward pass.
    pub positions: u64,
    /// Ways to need less memory, the most promising first.
    pub advice: Vec<String>,
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(1 << 20));
        write!(
            f,
            "weights {}, optimiser {}, gradients {}, activations of a pass over {} positions about {}; {}",
            mib(self.weights),
            mib(self.optimizer),
            mib(self.gradients),
            self.positions,
            mib(self.activations),
            self.advice.join("; or ")
        )
    }
}
