//! The loss of stage 2: clipped surrogate, value loss, entropy bonus, KL to a reference and attention term, computed from terms per
//! token. Results have the dtype of the log-probabilities.

use tch::{Tensor, no_grad};
use unveil_core::{Importance, Surrogate};

use crate::attention::{MentionBatch, attention_rewards};
use crate::error::expect_shape;
use crate::importance::importance_weights;
use crate::kl::kl_terms;
use crate::layout::{Counts, TokenLayout};
use crate::reduction::token_weights;
use crate::surrogate::{approx_kl, cispo_terms, clip_fraction, log_ratios, policy_terms};
use crate::{AlgoError, Objective};

/// Values per token of a (micro-)batch: all `[N]`, of one dtype (f32 or f64).
#[derive(Debug, Default)]
pub struct TokenBatch<'a> {
    /// Log-probabilities under the policy; differentiable.
    pub logprobs: Option<&'a Tensor>,
    /// Log-probabilities under the policy in the denominator of the ratio: those recorded by the rollout, or the learner's before the
    /// update (proximal).
    pub old_logprobs: Option<&'a Tensor>,
    /// Log-probabilities recorded by the rollout, for importance weights.
    pub behaviour: Option<&'a Tensor>,
    /// Advantages.
    pub advantages: Option<&'a Tensor>,
    /// Entropy of the policy at each token; differentiable.
    pub entropy: Option<&'a Tensor>,
    /// Values of the value head; differentiable.
    pub values: Option<&'a Tensor>,
    /// Values before the update.
    pub old_values: Option<&'a Tensor>,
    /// Value targets.
    pub targets: Option<&'a Tensor>,
    /// Log-probabilities under the reference model.
    pub reference: Option<&'a Tensor>,
    /// Attention rows `[N, V]` (differentiable) and the mentions among them.
    pub attention: Option<(&'a Tensor, &'a MentionBatch)>,
}

/// The loss and its parts. The parts are detached scalars, reduced as the objective says and not multiplied by their coefficients. They
/// add up over micro-batches and ranks.
#[derive(Debug)]
pub struct LossParts {
    /// The loss, differentiable.
    pub loss: Tensor,
    /// Clipped surrogate or CISPO, multiplied by importance weights.
    pub policy: Tensor,
    /// Value loss; 0 without one.
    pub value: Tensor,
    /// Entropy; 0 if it is not given.
    pub entropy: Tensor,
    /// KL to the reference; 0 without one.
    pub kl: Tensor,
    /// Mean differentiable vision relevance; 0 without the term.
    pub attention: Tensor,
    /// Means over tokens.
    pub means: TokenMeans,
}

/// This (micro-)batch's contribution to means over all tokens of the whole batch, independent of the reduction; detached scalars.
#[derive(Debug)]
pub struct TokenMeans {
    /// Entropy in nats; 0 if it is not given.
    pub entropy: Tensor,
    /// KL to the reference in the form of the objective; 0 without a reference.
    pub kl: Tensor,
    /// Share of tokens with a ratio outside the clip range.
    pub clip_fraction: Tensor,
    /// k3 estimate of KL(old policy || policy).
    pub approx_kl: Tensor,
    /// Importance weight, and the share of tokens at which its cap took effect; `None` without correction.
    pub importance: Option<(Tensor, Tensor)>,
}

/// Returns per token half the larger of two squared errors: of the value, and of the value clipped to `old ± clip` (PPO's reference
/// implementation; arXiv 2005.12729, section 3). `clip = 0` disables clipping. `[N]`, differentiable in `values`.
pub fn value_terms(values: &Tensor, old: &Tensor, targets: &Tensor, clip: f64) -> Tensor {
    let error = (values - targets).square();
    if clip <= 0.0 {
        return error * 0.5;
    }
    let clipped = old + (values - old).clamp(-clip, clip);
    error.maximum(&(clipped - targets).square()) * 0.5
}

/// Returns an input that a term needs, after checking its shape.
fn require<'a>(
    t: Option<&'a Tensor>,
    term: &'static str,
    input: &'static str,
    n: i64,
) -> Result<&'a Tensor, AlgoError> {
    let t = t.ok_or(AlgoError::Missing { term, input })?;
    expect_shape(input, t, &[n])?;
    Ok(t)
}

/// Weighted sum of loss terms.
struct WeightedSum {
    loss: Option<Tensor>,
}

impl WeightedSum {
    fn add(&mut self, term: &Tensor, coef: f64) -> Result<(), AlgoError> {
        let weighted = term * coef;
        self.loss = Some(match self.loss.take() {
            Some(sum) => sum.f_add(&weighted)?,
            None => weighted,
        });
        Ok(())
    }
}

/// Computes the loss of a (micro-)batch with the given `layout`, which is part of a batch with `counts`.
///
/// # Errors
/// Returns [`AlgoError::Missing`] or [`AlgoError::Shape`] if an input of a term is missing or has the wrong shape, and
/// [`AlgoError::Empty`] if no term has a weight.
pub fn policy_loss(
    objective: &Objective,
    batch: &TokenBatch,
    layout: &TokenLayout,
    counts: &Counts,
) -> Result<LossParts, AlgoError> {
    let o = objective;
    let n = layout.tokens() as i64;
    let logprobs = require(batch.logprobs, "policy", "logprobs", n)?;
    let old = require(batch.old_logprobs, "policy", "old_logprobs", n)?;
    let advantages = require(batch.advantages, "policy", "advantages", n)?;
    let kind = logprobs.kind();
    let device = logprobs.device();
    let weights = token_weights(o.reduction, o.max_length, layout, counts);
    let weights = Tensor::f_from_slice(&weights)?.f_to_device(device)?.f_to_kind(kind)?;
    let sum = |t: &Tensor| (t * &weights).sum(kind);
    let mean = |t: &Tensor| t.detach().sum(kind) / counts.tokens.max(1) as f64;
    let zero = || Tensor::zeros([] as [i64; 0], (kind, device));
    let mut total = WeightedSum { loss: None };

    let log_ratio = log_ratios(logprobs, old, o.ratio, layout)?;
    let terms = match o.surrogate {
        Surrogate::Clip => policy_terms(&log_ratio, advantages, &o.clip),
        Surrogate::Cispo => cispo_terms(logprobs, &log_ratio, advantages, &o.clip),
    };
    let importance = match o.importance {
        Importance::None => None,
        importance => {
            let behaviour = require(batch.behaviour, "importance", "behaviour", n)?;
            importance_weights(importance, o.importance_cap, old, behaviour)
        }
    };
    let policy = match &importance {
        Some(w) => sum(&(terms * &w.weights)),
        None => sum(&terms),
    };
    if o.policy_coef > 0.0 {
        total.add(&policy, o.policy_coef)?;
    }
    let mut value = zero();
    if o.value_coef > 0.0 {
        let values = require(batch.values, "value", "values", n)?;
        let before = require(batch.old_values, "value", "old_values", n)?;
        value = sum(&value_terms(values, before, require(batch.targets, "value", "targets", n)?, o.value_clip));
        total.add(&value, o.value_coef)?;
    }
    let mut entropy = zero();
    let mut entropy_mean = zero();
    if o.entropy_coef != 0.0 || batch.entropy.is_some() {
        let e = require(batch.entropy, "entropy", "entropy", n)?;
        entropy = sum(e);
        entropy_mean = mean(e);
    }
    if o.entropy_coef != 0.0 {
        total.add(&entropy, -o.entropy_coef)?;
    }
    let mut kl = zero();
    let mut kl_mean = zero();
    if o.kl_coef > 0.0 || batch.reference.is_some() {
        let reference = require(batch.reference, "KL", "reference", n)?;
        let terms = kl_terms(o.kl_form, o.kl_gradient, logprobs, reference);
        kl = sum(&terms);
        kl_mean = mean(&terms);
    }
    if o.kl_coef > 0.0 {
        total.add(&kl, o.kl_coef)?;
    }
    let mut attention = zero();
    if o.attention_coef > 0.0 {
        let (rows, mentions) = batch.attention.ok_or(AlgoError::Missing { term: "attention", input: "attention" })?;
        attention = attention_rewards(rows, mentions)?.sum(rows.kind()) / counts.attended.max(1) as f64;
        total.add(&attention, -o.attention_coef)?;
    }
    let means = no_grad(|| TokenMeans {
        entropy: entropy_mean,
        kl: kl_mean,
        clip_fraction: mean(&clip_fraction(&log_ratio, &o.clip)),
        approx_kl: mean(&approx_kl(logprobs, old)),
        importance: importance.as_ref().map(|w| (mean(&w.weights), mean(&w.bounded))),
    });
    Ok(LossParts {
        loss: total.loss.ok_or(AlgoError::Empty)?,
        policy: policy.detach(),
        value: value.detach(),
        entropy: entropy.detach(),
        kl: kl.detach(),
        attention: attention.detach(),
        means,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single_group(lengths: &[usize]) -> (TokenLayout, Counts) {
        let layout = TokenLayout::new(vec![lengths.to_vec()]);
        (layout.clone(), layout.counts())
    }

    #[test]
    fn on_policy_loss_is_minus_the_mean_advantage() {
        let lp = Tensor::from_slice(&[-1.0f32, -2.0, -0.5]);
        let adv = Tensor::from_slice(&[1.0f32, -1.0, 3.0]);
        let batch =
            TokenBatch { logprobs: Some(&lp), old_logprobs: Some(&lp), advantages: Some(&adv), ..Default::default() };
        let (layout, counts) = single_group(&[1, 2]);
        let loss = |o: Objective| policy_loss(&o, &batch, &layout, &counts).unwrap();
        let p = loss(Objective::surrogate(0.2, 0.28));
        assert!((p.loss.double_value(&[]) + 1.0).abs() < 1e-6);
        assert_eq!((p.means.clip_fraction.double_value(&[]), p.means.approx_kl.double_value(&[])), (0.0, 0.0));
        let scaled = loss(Objective::paper(0.25, 0.0, 0.0, 0.2));
        assert!((scaled.loss.double_value(&[]) + 0.25).abs() < 1e-6, "c1 scales the advantages");
    }

    #[test]
    fn missing_inputs_are_named() {
        let lp = Tensor::from_slice(&[-1.0f32]);
        let two = Tensor::from_slice(&[-1.0f32, 0.0]);
        let full =
            |a| TokenBatch { logprobs: Some(&lp), old_logprobs: Some(&lp), advantages: Some(a), ..Default::default() };
        let (layout, counts) = single_group(&[1]);
        let base = Objective::surrogate(0.2, 0.2);
        let error = |o: Objective, a| policy_loss(&o, &full(a), &layout, &counts).unwrap_err();
        let e = error(Objective { kl_coef: 0.1, ..base }, &lp);
        assert_eq!(e.to_string(), "the KL term has a weight but `reference` was not given");
        assert!(matches!(error(base, &two), AlgoError::Shape { what: "advantages", .. }));
        let e = error(Objective { importance: Importance::Full, ..base }, &lp);
        assert_eq!(e.to_string(), "the importance term has a weight but `behaviour` was not given");
        let e = error(Objective { entropy_coef: 0.1, ..base }, &lp);
        assert!(matches!(e, AlgoError::Missing { input: "entropy", .. }));
        assert!(matches!(error(base.critic_only(), &lp), AlgoError::Empty));
        let critic = Objective { value_coef: 0.5, ..base }.critic_only();
        assert!(matches!(error(critic, &lp), AlgoError::Missing { input: "values", .. }));
    }
}
