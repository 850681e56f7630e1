//! Sections `[learner.lora]` and `[sft.lora]`: low-rank adapters instead of full training.

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
    /// Continues the adapters of stage 1 on the initial model instead of starting new ones on the merged model; KL is to the initial model
    /// then. Rank, alpha, rslora and targets must be those of `sft.lora`.
    pub continue_sft: bool,
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: 0, alpha: 16.0, rslora: false, targets: default_targets(), continue_sft: false }
    }
}

/// Returns the names of all linear layers of the decoder.
fn default_targets() -> Vec<String> {
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"].map(str::to_owned).to_vec()
}

/// Low-rank adapters (LoRA, arXiv 2106.09685) in stage 1: `B A` is trained in addition to frozen matrices. The model of stage 1 has them
/// merged; they are also in `stage1-adapter`, in the format of peft.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SftLora {
    /// Rank of the adapters; 0 disables them and trains all weights that are not frozen.
    pub rank: usize,
    /// Scale of the adapters, above 0: their output is multiplied by `alpha / rank`.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub alpha: f64,
    /// Multiplies the output by `alpha / sqrt(rank)` instead (rsLoRA, arXiv 2312.03732).
    pub rslora: bool,
    /// Linear layers that get an adapter: a full name or the last parts of a dotted name, with `*` matching any text. Names refer to layers
    /// of the decoder; names in the vision tower start with `visual.`.
    pub targets: Vec<String>,
    /// Probability with which an input of an adapter is set to 0 in training, 0 up to below 1; adapters must be in the decoder then.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub dropout: f64,
    /// Modules that are trained whole beside the adapters, by full name or the last parts of it, such as `merger` or `lm_head`
    /// (`modules_to_save` of peft).
    pub modules_to_save: Vec<String>,
}

impl Default for SftLora {
    fn default() -> Self {
        Self {
            rank: 0,
            alpha: 16.0,
            rslora: false,
            targets: default_targets(),
            dropout: 0.0,
            modules_to_save: Vec::new(),
        }
    }
}
