//! Turns the rewards of a batch into the per-token inputs of its loss: KL to the reference, advantages and value targets.

use std::ops::Range;

use tch::Tensor;
use unveil_algo::{
    AlgoError, Counts, Moments, ScoredResponse, TokenLayout, check_tokens, estimate_advantages, kl_terms,
};
use unveil_config::schema::KlPlacement;
use unveil_core::KlGradient;

use crate::batch::{TrainableGroup, TrainableResponse, attended_responses};
use crate::micro_batch::BatchItem;
use crate::settings::StepSettings;

/// Outputs of the models before the update, flat over the tokens of all groups.
pub(crate) struct PreUpdate {
    /// The policy's log-probabilities; `None` if the training passes yield them.
    pub logprobs: Option<Vec<f64>>,
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
/// reference per response in nats; `None` without a reference or without log-probabilities.
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
    let kl = match &before.logprobs {
        Some(logprobs) => token_kl(&layout, logprobs, before.reference.as_deref(), s)?,
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
        let mut responses: Vec<ScoredResponse<'_>> = g.responses.iter().zip(g.response_ranges()).map(sampled).collect();
        if s.estimator.algorithm.compares_responses() {
            let filtered = |reward: &f64| ScoredResponse { reward: *reward, tokens: 0, penalty: &[], values: &[] };
            responses.extend(g.filtered_rewards.iter().map(filtered));
        }
        sampled_groups.push(responses);
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
        if let Some(logprobs) = &before.logprobs {
            g.proximal_logprobs = logprobs[range.clone()].to_vec();
        }
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
    Ok(kl.map(|kl| per_response(&kl, &layout)))
}

/// Returns the mean KL to the reference per response in nats, from log-probabilities that are flat over `groups`; `None` without a
/// reference.
///
/// # Errors
/// Returns [`AlgoError::NotFinite`], with positions among `groups`.
pub(crate) fn kl_to_reference(
    groups: &[&TrainableGroup<'_>],
    logprobs: &[f64],
    reference: Option<&[f64]>,
    s: &StepSettings,
) -> Result<Option<f64>, AlgoError> {
    let layout = layout(groups);
    Ok(token_kl(&layout, logprobs, reference, s)?.map(|kl| per_response(&kl, &layout)))
}

/// Returns the KL to the reference by token.
fn token_kl(
    layout: &TokenLayout,
    logprobs: &[f64],
    reference: Option<&[f64]>,
    s: &StepSettings,
) -> Result<Option<Vec<f64>>, AlgoError> {
    check_tokens("recomputed log-probability", logprobs, layout)?;
    let Some(reference) = reference else { return Ok(None) };
    check_tokens("reference log-probability", reference, layout)?;
    let form = s.objective.kl_form;
    let terms = kl_terms(form, KlGradient::Own, &Tensor::f_from_slice(logprobs)?, &Tensor::f_from_slice(reference)?);
    Ok(Some(Vec::<f64>::try_from(&terms)?))
}

fn per_response(kl: &[f64], layout: &TokenLayout) -> f64 {
    kl.iter().sum::<f64>() / layout.counts().responses.max(1) as f64
}

/// Returns a range of `values`, or nothing if `values` is empty.
fn range_or_empty(values: &[f64], range: Range<usize>) -> &[f64] {
    values.get(range).unwrap_or_default()
}
