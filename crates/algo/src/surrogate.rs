//! The clipped surrogate: ratios per token or per response, and the terms that a policy is trained on. Must not know: where
//! advantages come from, how terms are aggregated.

use tch::Tensor;

use crate::AlgoError;
use crate::layout::Layout;

/// What a ratio of probabilities is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RatioLevel {
    /// Each token has its own: exp(logp - old).
    Token,
    /// All tokens of a response share the geometric mean of theirs: exp(mean over tokens of (logp - old)) (GSPO, arXiv
    /// 2507.18071, eq. 7). Clip ranges are some hundred times smaller then.
    Sequence,
}

/// Where ratios are clipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    /// Ratios below `1 - low` are clipped.
    pub low: f64,
    /// Ratios above `1 + high` are clipped (a higher one than `low`: DAPO, arXiv 2503.14476, eq. 10).
    pub high: f64,
    /// c of dual clip, above 1: for a negative advantage the objective is at least `c A`, so that a ratio above c, where plain
    /// clipping has no bound, gives no gradient (arXiv 1912.09729, dual-clip PPO).
    pub dual: Option<f64>,
}

/// Log-ratios per token, `[N]`, differentiable in `logprobs`. Responses of `layout` must be whole.
pub fn log_ratios(logprobs: &Tensor, old: &Tensor, level: RatioLevel, layout: &Layout) -> Result<Tensor, AlgoError> {
    let each = logprobs.f_sub(old)?;
    if level == RatioLevel::Token {
        return Ok(each);
    }
    let lengths: Vec<f64> = layout.lengths().iter().flatten().map(|n| (*n).max(1) as f64).collect();
    let like = (each.kind(), each.device());
    let response = Tensor::f_from_slice(&layout.response_of())?.f_to_device(each.device())?;
    let sums = Tensor::f_zeros([lengths.len() as i64], like)?.f_index_add(0, &response, &each)?;
    let means = sums / Tensor::f_from_slice(&lengths)?.f_to_device(each.device())?.f_to_kind(each.kind())?;
    Ok(means.f_index_select(0, &response)?)
}

/// Per token, `-min(rho A, clip(rho, 1 - low, 1 + high) A)` with `rho = exp(log_ratio)` (PPO, arXiv 1707.06347, eq. 7), and with
/// dual clip `-max(that min, c A)` where A is negative. `[N]`, differentiable in `log_ratio`.
pub fn policy_terms(log_ratio: &Tensor, advantages: &Tensor, clip: &Clip) -> Tensor {
    let ratio = log_ratio.exp();
    let clipped = ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
    let objective = (ratio * advantages).minimum(&(clipped * advantages));
    match clip.dual {
        // Where A is not negative the floor is moved out of the way: 0 <= min(...) there, and c A would not be a bound.
        Some(c) => -objective.maximum(&(advantages.clamp_max(0.0) * c)),
        None => -objective,
    }
}

/// Per token, 1 where the ratio left `[1 - low, 1 + high]`, else 0. `[N]`, of the kind of `log_ratio`.
pub fn clip_fraction(log_ratio: &Tensor, clip: &Clip) -> Tensor {
    let ratio = log_ratio.exp();
    ratio.lt(1.0 - clip.low).logical_or(&ratio.gt(1.0 + clip.high)).to_kind(log_ratio.kind())
}

/// Per token, the k3 estimate of KL(old || policy) from samples of the old policy: (rho - 1) - log rho. `[N]`.
pub fn approx_kl(logprobs: &Tensor, old: &Tensor) -> Tensor {
    let d = logprobs - old;
    d.exp() - 1.0 - d
}
