//! Section `[learner.lora]`: low-rank adapters instead of full training.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Low-rank adapters (LoRA, arXiv 2106.09685): stage 2 trains `B A` in addition to frozen matrices. There is no dropout, because rollout
/// and learner must compute the same function.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Rank of the adapters; 0 disables them and trains all weights.
    pub rank: usize,
    /// Scale of the adapters, above 0: their output is multiplied by `alpha / rank`.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub alpha: f64,
    /// Multiplies the output by `alpha / sqrt(rank)` instead (rsLoRA, arXiv 2312.03732).
    pub rslora: bool,
    /// Linear layers that get an adapter: a full name or the last parts of a dotted name, with `*` matching any text. Names refer to layers
    /// of the decoder; names in the vision tower start with `visual.`.
    pub targets: Vec<String>,
}

impl Default for Lora {
    fn default() -> Self {
        let targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        Self { rank: 0, alpha: 16.0, rslora: false, targets: targets.map(str::to_owned).to_vec() }
    }
}
