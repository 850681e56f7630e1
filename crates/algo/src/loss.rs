//! The stage 2 loss: clipped surrogate, value loss, entropy bonus, KL to a reference, attention term, put together from the terms
//! of single tokens. Results have the kind of the log-probabilities. Must not know: how its inputs were made.

use tch::{Tensor, no_grad};

use crate::attention::{MentionBatch, attention_rewards};
use crate::error::expect_shape;
use crate::kl::kl_terms;
use crate::layout::{Counts, Layout};
use crate::surrogate::{approx_kl, clip_fraction, log_ratios, policy_terms};
use crate::{AlgoError, Objective};

/// The tokens of a (micro-)batch: all `[N]`, of one kind (f32 or f64).
#[derive(Debug, Default)]
pub struct TokenBatch<'a> {
    /// Log-probabilities under the policy; differentiable.
    pub logprobs: Option<&'a Tensor>,
    /// Log-probabilities under the policy that the ratio is taken to: the weights that made the tokens as the rollout recorded
    /// them, or the learner's own before the update (proximal).
    pub old_logprobs: Option<&'a Tensor>,
    /// Log-probabilities as the rollout recorded them, for [`crate::Correction`].
    pub behaviour: Option<&'a Tensor>,
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

/// The loss and its parts: detached scalars, aggregated as the objective says, weights not applied. They add up over
/// micro-batches and ranks.
#[derive(Debug)]
pub struct LossParts {
    /// What is differentiated.
    pub loss: Tensor,
    /// Clipped surrogate, importance weights applied.
    pub policy: Tensor,
    /// Value loss; 0 where there is none.
    pub value: Tensor,
    /// Entropy; 0 where it was not given.
    pub entropy: Tensor,
    /// KL to the reference; 0 where none was given.
    pub kl: Tensor,
    /// Mean differentiable vision relevance; 0 where there is none.
    pub attention: Tensor,
    /// Means over tokens.
    pub means: TokenMeans,
}

/// Means over the tokens of the whole batch, whatever the aggregation: this part's share of them, detached scalars.
#[derive(Debug)]
pub struct TokenMeans {
    /// Entropy in nats; 0 where it was not given.
    pub entropy: Tensor,
    /// KL to the reference in the objective's form; 0 where none was given.
    pub kl: Tensor,
    /// Share of tokens whose ratio left the clip range.
    pub clip_fraction: Tensor,
    /// k3 estimate of KL(old policy || policy).
    pub approx_kl: Tensor,
    /// Importance weight and the share of tokens at which its cap took effect; none where nothing is corrected.
    pub importance: Option<(Tensor, Tensor)>,
}

/// Per token, half the larger of the squared errors of the value and of the value clipped to `old ± clip` (PPO's reference
/// implementation; arXiv 2005.12729, section 3). `clip = 0` does not clip. `[N]`, differentiable in `values`.
pub fn value_terms(values: &Tensor, old: &Tensor, targets: &Tensor, clip: f64) -> Tensor {
    let error = (values - targets).square();
    if clip <= 0.0 {
        return error * 0.5;
    }
    let near = old + (values - old).clamp(-clip, clip);
    error.maximum(&(near - targets).square()) * 0.5
}

fn need<'a>(t: Option<&'a Tensor>, term: &'static str, input: &'static str, n: i64) -> Result<&'a Tensor, AlgoError> {
    let t = t.ok_or(AlgoError::Missing { term, input })?;
    expect_shape(input, t, &[n])?;
    Ok(t)
}

/// The sum of weighted terms, and what is differentiated so far.
struct Total {
    loss: Option<Tensor>,
}

impl Total {
    fn add(&mut self, term: &Tensor, coef: f64) -> Result<(), AlgoError> {
        let weighted = term * coef;
        self.loss = Some(match self.loss.take() {
            Some(sum) => sum.f_add(&weighted)?,
            None => weighted,
        });
        Ok(())
    }
}

/// The whole loss of a (micro-)batch laid out as `layout`, which is part of a batch with `counts`.
///
/// # Errors
/// An input that a term needs and that is missing or misshapen; an objective without any term.
pub fn policy_loss(
    objective: &Objective,
    batch: &TokenBatch,
    layout: &Layout,
    counts: &Counts,
) -> Result<LossParts, AlgoError> {
    let (o, n) = (objective, layout.tokens() as i64);
    let logprobs = need(batch.logprobs, "policy", "logprobs", n)?;
    let old = need(batch.old_logprobs, "policy", "old_logprobs", n)?;
    let advantages = need(batch.advantages, "policy", "advantages", n)?;
    let (kind, device) = (logprobs.kind(), logprobs.device());
    let weights = Tensor::f_from_slice(&o.aggregation.weights(layout, counts))?.f_to_device(device)?.f_to_kind(kind)?;
    let sum = |t: &Tensor| (t * &weights).sum(kind);
    let mean = |t: &Tensor| t.detach().sum(kind) / counts.tokens.max(1) as f64;
    let zero = || Tensor::zeros([] as [i64; 0], (kind, device));
    let mut total = Total { loss: None };

    let log_ratio = log_ratios(logprobs, old, o.ratio, layout)?;
    let terms = policy_terms(&log_ratio, advantages, &o.clip);
    let behaviour = match o.correction {
        crate::Correction::None => None,
        c => c.weights(old, need(batch.behaviour, "importance", "behaviour", n)?),
    };
    let policy = match &behaviour {
        Some(w) => sum(&(terms * &w.weights)),
        None => sum(&terms),
    };
    if o.policy_coef > 0.0 {
        total.add(&policy, o.policy_coef)?;
    }
    let mut value = zero();
    if o.value_coef > 0.0 {
        let values = need(batch.values, "value", "values", n)?;
        let before = need(batch.old_values, "value", "old_values", n)?;
        value = sum(&value_terms(values, before, need(batch.targets, "value", "targets", n)?, o.value_clip));
        total.add(&value, o.value_coef)?;
    }
    let (mut entropy, mut entropy_mean) = (zero(), zero());
    if o.entropy_coef != 0.0 || batch.entropy.is_some() {
        let e = need(batch.entropy, "entropy", "entropy", n)?;
        (entropy, entropy_mean) = (sum(e), mean(e));
    }
    if o.entropy_coef != 0.0 {
        total.add(&entropy, -o.entropy_coef)?;
    }
    let (mut kl, mut kl_mean) = (zero(), zero());
    if o.kl_coef > 0.0 || batch.reference.is_some() {
        let reference = need(batch.reference, "KL", "reference", n)?;
        let terms = kl_terms(o.kl_form, o.kl_gradient, logprobs, reference);
        (kl, kl_mean) = (sum(&terms), mean(&terms));
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
        importance: behaviour.as_ref().map(|w| (mean(&w.weights), mean(&w.bounded))),
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
    use crate::Correction;

    fn one(lengths: &[usize]) -> (Layout, Counts) {
        let layout = Layout::new(vec![lengths.to_vec()]);
        (layout.clone(), layout.counts())
    }

    #[test]
    fn on_policy_loss_is_minus_the_mean_advantage() {
        let lp = Tensor::from_slice(&[-1.0f32, -2.0, -0.5]);
        let adv = Tensor::from_slice(&[1.0f32, -1.0, 3.0]);
        let batch =
            TokenBatch { logprobs: Some(&lp), old_logprobs: Some(&lp), advantages: Some(&adv), ..Default::default() };
        let (layout, counts) = one(&[1, 2]);
        let loss = |o: Objective| policy_loss(&o, &batch, &layout, &counts).unwrap();
        let p = loss(Objective::surrogate(0.2, 0.28));
        assert!((p.loss.double_value(&[]) + 1.0).abs() < 1e-6);
        assert_eq!((p.means.clip_fraction.double_value(&[]), p.means.approx_kl.double_value(&[])), (0.0, 0.0));
        let scaled = loss(Objective::paper(0.25, 0.0, 0.0, 0.2));
        assert!((scaled.loss.double_value(&[]) + 0.25).abs() < 1e-6, "c1 scales the advantages");
    }

    #[test]
    fn what_is_missing_is_named() {
        let lp = Tensor::from_slice(&[-1.0f32]);
        let two = Tensor::from_slice(&[-1.0f32, 0.0]);
        let full =
            |a| TokenBatch { logprobs: Some(&lp), old_logprobs: Some(&lp), advantages: Some(a), ..Default::default() };
        let (layout, counts) = one(&[1]);
        let base = Objective::surrogate(0.2, 0.2);
        let fault = |o: Objective, a| policy_loss(&o, &full(a), &layout, &counts).unwrap_err();
        let e = fault(Objective { kl_coef: 0.1, ..base }, &lp);
        assert_eq!(e.to_string(), "the KL term has a weight but `reference` was not given");
        assert!(matches!(fault(base, &two), AlgoError::Shape { what: "advantages", .. }));
        let e = fault(Objective { correction: Correction::Full, ..base }, &lp);
        assert_eq!(e.to_string(), "the importance term has a weight but `behaviour` was not given");
        let e = fault(Objective { entropy_coef: 0.1, ..base }, &lp);
        assert!(matches!(e, AlgoError::Missing { input: "entropy", .. }));
        assert!(matches!(fault(base.critic_only(), &lp), AlgoError::Empty));
        let critic = Objective { value_coef: 0.5, ..base }.critic_only();
        assert!(matches!(fault(critic, &lp), AlgoError::Missing { input: "values", .. }));
    }
}
