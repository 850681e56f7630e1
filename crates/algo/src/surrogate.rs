//! The policy terms of the loss, clipped surrogate and CISPO, with probability ratios per token or per response.

use tch::Tensor;
use unveil_core::RatioLevel;

use crate::AlgoError;
use crate::layout::TokenLayout;

/// Bounds at which ratios are clipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipRange {
    /// Ratios below `1 - low` are clipped.
    pub low: f64,
    /// Ratios above `1 + high` are clipped (higher than `low`: DAPO, arXiv 2503.14476, eq. 10).
    pub high: f64,
    /// c of dual clip, above 1: for a negative advantage the objective is at least `c A`, so that a ratio above c, which plain clipping
    /// does not bound, has no gradient (dual-clip PPO, arXiv 1912.09729).
    pub dual: Option<f64>,
}

/// Returns log-ratios per token, `[N]`, differentiable in `logprobs`. Responses of `layout` must not be split.
///
/// Per token, the ratio is exp(logp - old). Per response, all its tokens share the geometric mean of their ratios, exp(mean over tokens of
/// (logp - old)) (GSPO, arXiv 2507.18071, eq. 7); clip ranges are then some hundred times smaller.
pub fn log_ratios(
    logprobs: &Tensor,
    old: &Tensor,
    level: RatioLevel,
    layout: &TokenLayout,
) -> Result<Tensor, AlgoError> {
    let per_token = logprobs.f_sub(old)?;
    if level == RatioLevel::Token {
        return Ok(per_token);
    }
    let lengths: Vec<f64> = layout.lengths().iter().flatten().map(|n| (*n).max(1) as f64).collect();
    let like = (per_token.kind(), per_token.device());
    let response = Tensor::f_from_slice(&layout.response_indices())?.f_to_device(per_token.device())?;
    let sums = Tensor::f_zeros([lengths.len() as i64], like)?.f_index_add(0, &response, &per_token)?;
    let means = sums / Tensor::f_from_slice(&lengths)?.f_to_device(per_token.device())?.f_to_kind(per_token.kind())?;
    Ok(means.f_index_select(0, &response)?)
}

/// Returns per token `-min(rho A, clip(rho, 1 - low, 1 + high) A)` with `rho = exp(log_ratio)` (PPO, arXiv 1707.06347, eq. 7), and with
/// dual clip `-max(that minimum, c A)` for negative A. `[N]`, differentiable in `log_ratio`.
pub fn policy_terms(log_ratio: &Tensor, advantages: &Tensor, clip: &ClipRange) -> Tensor {
    let ratio = log_ratio.exp();
    let clipped = ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
    let objective = (ratio * advantages).minimum(&(clipped * advantages));
    match clip.dual {
        // For A >= 0 the floor is 0, which is below min(...); c A would be above it.
        Some(c) => -objective.maximum(&(advantages.clamp_max(0.0) * c)),
        None => -objective,
    }
}

/// Returns per token `-sg(clip(rho, 1 - low, 1 + high)) A log p` with `rho = exp(log_ratio)` and `sg` without gradient (CISPO, MiniMax-M1,
/// arXiv 2506.13585, eq. 4 and 5). `low` of 1 or more sets no lower bound, as in the source; `dual` has no effect. `[N]`, differentiable in
/// `logprobs`.
pub fn cispo_terms(logprobs: &Tensor, log_ratio: &Tensor, advantages: &Tensor, clip: &ClipRange) -> Tensor {
    let weight = log_ratio.detach().exp().clamp(1.0 - clip.low, 1.0 + clip.high);
    -(weight * advantages * logprobs)
}

/// Returns per token 1 if the ratio is outside `[1 - low, 1 + high]`, else 0. `[N]`, of the dtype of `log_ratio`.
pub fn clip_fraction(log_ratio: &Tensor, clip: &ClipRange) -> Tensor {
    let ratio = log_ratio.exp();
    ratio.lt(1.0 - clip.low).logical_or(&ratio.gt(1.0 + clip.high)).to_kind(log_ratio.kind())
}

/// Returns per token the k3 estimate of KL(old || policy) from samples of the old policy: (rho - 1) - log rho. `[N]`.
pub fn approx_kl(logprobs: &Tensor, old: &Tensor) -> Tensor {
    let d = logprobs - old;
    d.exp() - 1.0 - d
}
