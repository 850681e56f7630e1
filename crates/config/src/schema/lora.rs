//! The section `[learner.lora]`: low-rank adapters in place of all weights.

use serde::{Deserialize, Serialize};

/// Low-rank adapters (LoRA, arXiv 2106.09685): stage 2 trains `B A` beside matrices that stay as they are. There is no dropout,
/// which only one of rollout and learner would see.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Rank of the adapters; 0 = none, all weights are trained.
    pub rank: usize,
    /// What an adapter adds is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Multiply by `alpha / sqrt(rank)` instead (rsLoRA, arXiv 2312.03732).
    pub rslora: bool,
    /// Linear layers that get one, by name or the end of it behind a dot, `*` being any text. A name means layers of the decoder;
    /// those of the vision tower begin with `visual.`.
    pub targets: Vec<String>,
}

impl Default for Lora {
    fn default() -> Self {
        let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        Self { rank: 0, alpha: 16.0, rslora: false, targets: targets.map(str::to_owned).to_vec() }
    }
}
