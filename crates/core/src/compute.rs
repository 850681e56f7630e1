//! Precision of a model's computation.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Precision of matrix products, of the attention's operands and of KV caches. Residual stream, norms, softmax, log-probabilities and
/// reductions are fp32 in every mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    /// fp32 operands. bf16 weights are multiplied on a GPU with inputs that are split in two bf16 summands, except where gradients are
    /// recorded. KV caches are fp32.
    #[default]
    Exact,
    /// bf16 operands with fp32 sums. Queries, keys, values and KV caches are bf16, rounded in training and generation alike.
    Fast,
    /// TF32 products of fp32 operands, on GPUs only. KV caches are fp32.
    Tf32,
}
