//! The stage 2 loss: clipped surrogate, value loss, entropy bonus, KL to a reference, attention term; every one a mean over the
//! tokens of the whole batch, so that long responses weigh by their tokens and micro-batches add up.

use tch::{Kind, Tensor};

use crate::attention::{MentionBatch, attention_rewards};
use crate::{AlgoError, expect_shape};

/// Weights and clip ranges of the loss
/// `L = L_clip + value_coef L_VF - entropy_coef S + kl_coef KL - attention_coef mean(r_att)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// Ratios below `1 - clip_low` are clipped.
    pub clip_low: f64,
    /// Ratios above `1 + clip_high` are clipped (a higher one than `clip_low`: DAPO, arXiv 2503.14476, eq. 10).
    pub clip_high: f64,
    /// c2; 0 = no value loss.
    pub value_coef: f64,
    /// Clip range of the value loss; 0 = not clipped.
    pub value_clip: f64,
    /// c3.
    pub entropy_coef: f64,
    /// Weight of the k3 estimate of KL(policy || reference).
    pub kl_coef: f64,
    /// Weight of the differentiable vision relevance.
    pub attention_coef: f64,
}

/// The tokens of a (micro-)batch: all `[N]`, f32.
#[derive(Debug, Default)]
pub struct TokenBatch<'a> {
    /// Log-probabilities under the policy; differentiable.
    pub logprobs: Option<&'a Tensor>,
    /// Log-probabilities under the weights that made the tokens.
    pub old_logprobs: Option<&'a Tensor>,
    /// Advantages.
    pub advantages: Option<&'a Tensor>,
    /// Entropy of the policy at each token; differentiable.
    pub entropy: Option<&'a Tensor>,
    /// Values under the value head; differentiable.
    pub values: Option<&'a Tensor>,
    /// Values before the update.
    pub old_values: Option<&'a Tensor>,
    /// Value targets.
    pub targets: Option<&'a Tensor>,
    /// Log-probabilities under the reference model.
    pub reference: Option<&'a Tensor>,
    /// Attention rows `[N, V]` (differentiable) and which of them count.
    pub attention: Option<(&'a Tensor, &'a MentionBatch)>,
}

/// What a mean is divided by: the counts of the whole batch, so that the losses of its micro-batches add up to its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenStats {
    /// Tokens in the whole batch.
    pub tokens: f64,
    /// Responses in the whole batch that have vision relevance.
    pub attended: f64,
}

/// The loss and its parts; the parts are detached scalars, weights not applied.
#[derive(Debug)]
pub struct LossParts {
    /// What is differentiated.
    pub loss: Tensor,
    /// Clipped surrogate.
    pub policy: Tensor,
    /// Value loss; 0 where there is none.
    pub value: Tensor,
    /// Mean entropy; 0 where there is none.
    pub entropy: Tensor,
    /// KL to the reference; 0 where there is none.
    pub kl: Tensor,
    /// Mean differentiable vision relevance; 0 where there is none.
    pub attention: Tensor,
    /// Share of tokens whose ratio left the clip range.
    pub clip_fraction: Tensor,
    /// k3 estimate of KL(old policy || policy).
    pub approx_kl: Tensor,
}

/// Per token, `-min(rho A, clip(rho, 1 - low, 1 + high) A)` with rho = exp(logp - old) (PPO, arXiv 1707.06347, eq. 7; asymmetric
/// range: DAPO, eq. 10). `[N]`, differentiable in `logprobs`.
pub fn policy_terms(logprobs: &Tensor, old: &Tensor, advantages: &Tensor, clip_low: f64, clip_high: f64) -> Tensor {
    let ratio = (logprobs - old).exp();
    let clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high);
    -(ratio * advantages).minimum(&(clipped * advantages))
}

/// Per token, half the larger of the squared errors of the value and of the value clipped to `old ± clip` (PPO's reference
/// implementation; arXiv 2005.12729, §3). `clip = 0` does not clip. `[N]`, differentiable in `values`.
pub fn value_terms(values: &Tensor, old: &Tensor, targets: &Tensor, clip: f64) -> Tensor {
    let error = (values - targets).square();
    if clip <= 0.0 {
        return error * 0.5;
    }
    let near = old + (values - old).clamp(-clip, clip);
    error.maximum(&(near - targets).square()) * 0.5
}

/// Per token, the k3 estimate of KL(policy || reference): exp(d) - d - 1 with d = reference - logp (J. Schulman, "Approximating
/// KL divergence"; GRPO eq. 4). Never negative. `[N]`.
pub fn kl_k3(logprobs: &Tensor, reference: &Tensor) -> Tensor {
    let d = reference - logprobs;
    d.exp() - d - 1.0
}

/// Per token, the k3 estimate of KL(old || policy) from samples of the old policy: (rho - 1) - log rho. `[N]`.
pub fn approx_kl(logprobs: &Tensor, old: &Tensor) -> Tensor {
    let d = logprobs - old;
    d.exp() - 1.0 - d
}

/// Per token, 1 where the ratio left `[1 - low, 1 + high]`, else 0. `[N]`.
pub fn clip_fraction(logprobs: &Tensor, old: &Tensor, clip_low: f64, clip_high: f64) -> Tensor {
    let ratio = (logprobs - old).exp();
    ratio.lt(1.0 - clip_low).logical_or(&ratio.gt(1.0 + clip_high)).to_kind(Kind::Float)
}

fn need<'a>(t: Option<&'a Tensor>, term: &'static str, input: &'static str, n: i64) -> Result<&'a Tensor, AlgoError> {
    let t = t.ok_or(AlgoError::Missing { term, input })?;
    expect_shape(input, t, &[n])?;
    Ok(t)
}

/// The whole loss of a (micro-)batch: every sum over its tokens divided by the counts of the whole batch in `stats`.
pub fn policy_loss(objective: &Objective, batch: &TokenBatch, stats: TokenStats) -> Result<LossParts, AlgoError> {
    let o = objective;
    let logprobs = batch.logprobs.ok_or(AlgoError::Missing { term: "policy", input: "logprobs" })?;
    let n = logprobs.size().first().copied().unwrap_or(0);
    expect_shape("logprobs", logprobs, &[n])?;
    let old = need(batch.old_logprobs, "policy", "old_logprobs", n)?;
    let advantages = need(batch.advantages, "policy", "advantages", n)?;
    let mean = |t: Tensor| t.sum(Kind::Float) / stats.tokens.max(1.0);
    let zero = || Tensor::zeros([] as [i64; 0], (Kind::Float, logprobs.device()));

    let policy = mean(policy_terms(logprobs, old, advantages, o.clip_low, o.clip_high));
    let mut loss = policy.shallow_clone();
    let mut value = zero();
    if o.value_coef > 0.0 {
        let values = need(batch.values, "value", "values", n)?;
        let before = need(batch.old_values, "value", "old_values", n)?;
        let targets = need(batch.targets, "value", "targets", n)?;
        value = mean(value_terms(values, before, targets, o.value_clip));
        loss = loss.f_add(&(&value * o.value_coef))?;
    }
    let mut entropy = zero();
    if let Some(e) = batch.entropy {
        expect_shape("entropy", e, &[n])?;
        entropy = mean(e.shallow_clone());
    }
    if o.entropy_coef != 0.0 {
        need(batch.entropy, "entropy", "entropy", n)?;
        loss = loss.f_sub(&(&entropy * o.entropy_coef))?;
    }
    let mut kl = zero();
    if o.kl_coef > 0.0 {
        kl = mean(kl_k3(logprobs, need(batch.reference, "KL", "reference", n)?));
        loss = loss.f_add(&(&kl * o.kl_coef))?;
    }
    let mut attention = zero();
    if o.attention_coef > 0.0 {
        let (rows, mentions) = batch.attention.ok_or(AlgoError::Missing { term: "attention", input: "attention" })?;
        attention = attention_rewards(rows, mentions)?.sum(Kind::Float) / stats.attended.max(1.0);
        loss = loss.f_sub(&(&attention * o.attention_coef))?;
    }
    let (clipped, moved) =
        tch::no_grad(|| (mean(clip_fraction(logprobs, old, o.clip_low, o.clip_high)), mean(approx_kl(logprobs, old))));
    Ok(LossParts {
        loss,
        policy: policy.detach(),
        value: value.detach(),
        entropy: entropy.detach(),
        kl: kl.detach(),
        attention: attention.detach(),
        clip_fraction: clipped,
        approx_kl: moved,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const O: Objective = Objective {
        clip_low: 0.2,
        clip_high: 0.28,
        value_coef: 0.0,
        value_clip: 0.0,
        entropy_coef: 0.0,
        kl_coef: 0.0,
        attention_coef: 0.0,
    };

    #[test]
    fn on_policy_loss_is_minus_the_mean_advantage() {
        let lp = Tensor::from_slice(&[-1.0f32, -2.0, -0.5]);
        let adv = Tensor::from_slice(&[1.0f32, -1.0, 3.0]);
        let batch =
            TokenBatch { logprobs: Some(&lp), old_logprobs: Some(&lp), advantages: Some(&adv), ..Default::default() };
        let p = policy_loss(&O, &batch, TokenStats { tokens: 3.0, attended: 0.0 }).unwrap();
        assert!((p.loss.double_value(&[]) + 1.0).abs() < 1e-6);
        assert_eq!((p.clip_fraction.double_value(&[]), p.approx_kl.double_value(&[])), (0.0, 0.0));
    }

    #[test]
    fn what_is_missing_is_named() {
        let lp = Tensor::from_slice(&[-1.0f32]);
        let two = Tensor::from_slice(&[-1.0f32, 0.0]);
        let full =
            |a| TokenBatch { logprobs: Some(&lp), old_logprobs: Some(&lp), advantages: Some(a), ..Default::default() };
        let stats = TokenStats { tokens: 1.0, attended: 0.0 };
        let e = policy_loss(&Objective { kl_coef: 0.1, ..O }, &full(&lp), stats).unwrap_err();
        assert_eq!(e.to_string(), "the KL term has a weight but `reference` was not given");
        assert!(matches!(policy_loss(&O, &full(&two), stats), Err(AlgoError::Shape { what: "advantages", .. })));
    }
}
