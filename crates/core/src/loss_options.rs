//! Options of the loss of stage 2, as they are configured and computed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Unit over which a probability ratio is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// Each token.
    Token,
    /// A whole response: the geometric mean of the ratios of its tokens (GSPO, arXiv 2507.18071). Use clip ranges of about 1e-4 to 1e-3.
    Sequence,
}

/// Form of the policy loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Surrogate {
    /// The clipped surrogate of PPO: a token whose ratio has left the clip range has no gradient.
    Clip,
    /// CISPO: the log-probability of each token, weighted by the advantage and by the ratio, which is clipped and has no gradient. Every
    /// token keeps its gradient (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).
    Cispo,
}

/// Importance weight `w = exp(learner before the update - rollout)` of each token's surrogate; used if `ratio_to = "learner"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Importance {
    /// No weight (1).
    None,
    /// w: the decoupled objective for stale data (AReaL, arXiv 2505.24298).
    Full,
    /// min(w, `importance_cap`): truncated importance sampling.
    Truncate,
    /// w if it is within [1 / `importance_cap`, `importance_cap`], else 0: the token is dropped.
    Mask,
}

/// Reduction of the loss over the tokens of a mini-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossReduction {
    /// Mean over all tokens of a mini-batch (DAPO).
    Token,
    /// Mean over responses of the mean over their tokens (GRPO).
    SequenceTokenMean,
    /// Mean over responses of the sum over their tokens.
    SequenceTokenSum,
    /// Mean over responses of the sum over their tokens divided by `rollout.max_new_tokens` (Dr. GRPO).
    SequenceMaxLength,
    /// Mean over groups of the mean over the group's tokens.
    GroupTokenMean,
}

/// Estimator of the KL divergence to the reference per token, with d = log policy - log reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlForm {
    /// d. The form for the reward; in the loss, its gradient is 0 in expectation.
    K1,
    /// d^2 / 2. In the loss, it has the gradient of KL(policy || reference).
    K2,
    /// exp(-d) - 1 + d, never negative. In the loss, it has the gradient of KL(reference || policy), equal to the gradient of k2 to first order.
    K3,
}

/// Gradient of the KL term in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlGradient {
    /// Gradient of `kl_form`.
    Own,
    /// Gradient of KL(policy || reference), independent of `kl_form`.
    Reverse,
}
