//! From the rewards of a batch to what its loss needs per token: KL to the reference, advantages, value targets. Must not know:
//! the model, the optimiser.

use std::ops::Range;

use tch::Tensor;
use unveil_algo::{AlgoError, Counts, KlGradient, Layout, Moments, Sampled, check_tokens, estimate, kl_terms};
use unveil_config::schema::KlPlace;

use crate::batch::{Member, Row, attended};
use crate::settings::StepSettings;

/// Numbers of the weights before the update, flat over the members.
pub(crate) struct Before {
    /// The policy's log-probabilities.
    pub logprobs: Vec<f64>,
    /// Values; none without a value head.
    pub values: Option<Vec<f64>>,
    /// The reference model's log-probabilities; none without one.
    pub reference: Option<Vec<f64>>,
}

/// How the members' tokens are divided.
pub(crate) fn layout(members: &[&Member<'_>]) -> Layout {
    Layout::new(members.iter().map(|m| m.packed.responses.iter().map(Vec::len).collect()).collect())
}

/// Counts of the members, responses with vision relevance among them.
pub(crate) fn counts(members: &[&Member<'_>]) -> Counts {
    Counts { attended: attended(members) as u64, ..layout(members).counts() }
}

/// Writes proximal and reference log-probabilities, advantages, values and value targets into the members. Returns KL to the
/// reference per response in nats, where there is one.
///
/// # Errors
/// [`AlgoError::NotFinite`] with positions among the members.
pub(crate) fn fill(
    members: &mut [Member<'_>],
    before: &Before,
    s: &StepSettings,
    kl_coef: f64,
) -> Result<Option<f64>, AlgoError> {
    let all: Vec<&Member> = members.iter().collect();
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
        Some(kl) if s.kl_in == KlPlace::Reward => kl.iter().map(|kl| kl_coef * kl).collect(),
        _ => Vec::new(),
    };
    let values = before.values.as_deref().unwrap_or_default();
    if before.values.is_some() {
        check_tokens("value", values, &layout)?;
    }
    let mut groups: Vec<Vec<Sampled<'_>>> = Vec::with_capacity(members.len());
    let mut begin = 0;
    for m in &all {
        let sampled = |(row, range): (&Row, Range<usize>)| {
            let at = begin + range.start..begin + range.end;
            let (penalty, values) = (part(&penalty, at.clone()), part(values, at));
            Sampled { reward: row.reward, tokens: range.len(), penalty, values }
        };
        groups.push(m.rows.iter().zip(m.ranges()).map(sampled).collect());
        begin += m.tokens();
    }
    let mut out = estimate(s.estimator, &groups)?;
    if s.whiten {
        Moments::of(&out.advantages).whiten(&mut out.advantages);
    }
    check_tokens("advantage", &out.advantages, &layout)?;
    let mut begin = 0;
    for m in members.iter_mut() {
        let range = begin..begin + m.tokens();
        m.proximal = before.logprobs[range.clone()].to_vec();
        m.advantages = out.advantages[range.clone()].to_vec();
        if let Some(v) = &before.values {
            m.old_values = v[range.clone()].to_vec();
        }
        if s.estimator.needs_values() {
            m.targets = out.targets[range.clone()].to_vec();
        }
        if let Some(r) = &before.reference {
            m.reference = r[range.clone()].to_vec();
        }
        begin = range.end;
    }
    Ok(kl.map(|kl| kl.iter().sum::<f64>() / layout.counts().responses.max(1) as f64))
}

/// A range of a series; nothing of a series that is empty.
fn part(all: &[f64], range: Range<usize>) -> &[f64] {
    all.get(range).unwrap_or_default()
}
