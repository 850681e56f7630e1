//! Turns the rewards of a batch into the per-token inputs of its loss: KL to the reference, advantages and value targets.

use std::ops::Range;

use tch::Tensor;
use unveil_algo::{
    AlgoError, Counts, Moments, ScoredResponse, TokenLayout, check_tokens, estimate_advantages, kl_terms,
};
use unveil_config::schema::KlPlacement;
use unveil_core::KlGradient;

use crate::batch::{TrainableGroup, TrainableResponse, attended_responses};
use crate::settings::StepSettings;

/// Outputs of the models before the update, flat over the tokens of all groups.
pub(crate) struct PreUpdate {
    /// The policy's log-probabilities.
    pub logprobs: Vec<f64>,
    /// Values; `None` without a value head.
    pub values: Option<Vec<f64>>,
    /// Log-probabilities under the reference model; `None` without one.
    pub reference: Option<Vec<f64>>,
}

/// Returns the division of the groups' tokens into groups and responses.
pub(crate) fn layout(groups: &[&TrainableGroup<'_>]) -> TokenLayout {
    TokenLayout::new(groups.iter().map(|g| g.packed.responses.iter().map(Vec::len).collect()).collect())
}

/// Returns the numbers of groups, responses, tokens and responses with vision relevance.
pub(crate) fn counts(groups: &[&TrainableGroup<'_>]) -> Counts {
    Counts { attended: attended_responses(groups) as u64, ..layout(groups).counts() }
}

/// Writes proximal and reference log-probabilities, advantages, values and value targets to the groups. Returns the mean KL to the
/// reference per response in nats; `None` without a reference.
///
/// # Errors
/// Returns [`AlgoError::NotFinite`], with positions among `groups`.
pub(crate) fn fill_targets(
    groups: &mut [TrainableGroup<'_>],
    before: &PreUpdate,
    s: &StepSettings,
    kl_coef: f64,
) -> Result<Option<f64>, AlgoError> {
    let all: Vec<&TrainableGroup> = groups.iter().collect();
    let layout = layout(&all);
    check_tokens("recomputed log-probability", &before.logprobs, &layout)?;
    let kl = match &before.reference {
        Some(reference) => {
            check_tokens("reference log-probability", reference, &layout)?;
            let o = &s.objective;
            let terms = kl_terms(
                o.kl_form,
                KlGradient::Own,
                &Tensor::f_from_slice(&before.logprobs)?,
                &Tensor::f_from_slice(reference)?,
            );
            Some(Vec::<f64>::try_from(&terms)?)
        }
        None => None,
    };
    let penalty: Vec<f64> = match &kl {
        Some(kl) if s.kl_in == KlPlacement::Reward => kl.iter().map(|kl| kl_coef * kl).collect(),
        _ => Vec::new(),
    };
    let values = before.values.as_deref().unwrap_or_default();
    if before.values.is_some() {
        check_tokens("value", values, &layout)?;
    }
    let mut sampled_groups: Vec<Vec<ScoredResponse<'_>>> = Vec::with_capacity(groups.len());
    let mut begin = 0;
    for g in &all {
        let sampled = |(response, range): (&TrainableResponse, Range<usize>)| {
            let tokens = begin + range.start..begin + range.end;
            let penalty = range_or_empty(&penalty, tokens.clone());
            let values = range_or_empty(values, tokens);
            ScoredResponse { reward: response.reward, tokens: range.len(), penalty, values }
        };
        sampled_groups.push(g.responses.iter().zip(g.response_ranges()).map(sampled).collect());
        begin += g.token_count();
    }
    let mut out = estimate_advantages(s.estimator, &sampled_groups)?;
    if s.whiten {
        Moments::from_values(&out.advantages).whiten(&mut out.advantages);
    }
    check_tokens("advantage", &out.advantages, &layout)?;
    let mut begin = 0;
    for g in groups.iter_mut() {
        let range = begin..begin + g.token_count();
        g.proximal_logprobs = before.logprobs[range.clone()].to_vec();
        g.advantages = out.advantages[range.clone()].to_vec();
        if let Some(v) = &before.values {
            g.old_values = v[range.clone()].to_vec();
        }
        if s.estimator.algorithm.needs_values() {
            g.value_targets = out.targets[range.clone()].to_vec();
        }
        if let Some(r) = &before.reference {
            g.reference_logprobs = r[range.clone()].to_vec();
        }
        begin = range.end;
    }
    Ok(kl.map(|kl| kl.iter().sum::<f64>() / layout.counts().responses.max(1) as f64))
}

/// Returns a range of `values`, or nothing if `values` is empty.
fn range_or_empty(values: &[f64], range: Range<usize>) -> &[f64] {
    values.get(range).unwrap_or_default()
}
