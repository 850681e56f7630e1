//! Composes components into a total: normalisation over the group, the mask rule, rescaled weights.
//!
//! Source: arXiv 2501.01377, total reward, with the parts that cannot work as printed made explicit (masking, epsilon).

use std::collections::BTreeMap;

use unveil_config::schema::{Gate, Normalise};
use unveil_core::{Component, MaskReason};

/// Weight and normalisation of one component of the total.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedComponent<'a> {
    /// Component name.
    pub name: &'a str,
    /// Weight, at least 0. With 0 the component is reported but not part of the total.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
}

/// Computes the totals of a group's responses, and masks components in `group` by the mask rule.
///
/// - A component masked for one response is masked for the whole group (`GroupMasked`; its raw value moves to the detail
///   `raw`). A value that is not finite counts as failed.
/// - `total = W / sum(w of unmasked components) * sum(w * normalised value)`, W = sum of all configured weights.
/// - All totals are `None` if no weighted component is left.
///
/// Range: `[0, W]` for values in `[0, 1]` under `none` and `max`; z-scores are centred on 0.
///
/// # Examples
/// ```
/// use std::collections::BTreeMap;
/// use unveil_config::schema::Normalise;
/// use unveil_core::{Component, MaskReason};
/// use unveil_reward::compose::{WeightedComponent, compose};
///
/// let response = |localization, relevance| {
///     BTreeMap::from([("localization".to_owned(), localization), ("relevance".to_owned(), relevance)])
/// };
/// let unavailable = Component::masked(MaskReason::Unavailable("the judge is overloaded".to_owned()));
/// let mut group = [
///     response(Component::value(0.5), Component::value(1.0)),
///     response(Component::value(1.0), unavailable),
/// ];
/// let weights = [("localization", 1.0), ("relevance", 0.5)];
/// let weighted = weights.map(|(name, weight)| WeightedComponent { name, weight, normalise: Normalise::None });
///
/// // Relevance is dropped for both responses, and the other weight is rescaled to the sum 1.5.
/// assert_eq!(compose(&mut group, &weighted, 1e-6), [Some(0.75), Some(1.5)]);
/// assert_eq!(group[0]["relevance"].reason, Some(MaskReason::GroupMasked));
/// ```
pub fn compose(
    group: &mut [BTreeMap<String, Component>],
    components: &[WeightedComponent<'_>],
    max_eps: f64,
) -> Vec<Option<f64>> {
    let mut totals = vec![0.0; group.len()];
    let mut configured = 0.0;
    let mut left = 0.0;
    for component in components {
        mask_group(group, component.name);
        configured += component.weight;
        let values: Option<Vec<f64>> = group.iter().map(|c| c.get(component.name)?.value).collect();
        let Some(values) = values.filter(|_| component.weight > 0.0) else {
            continue;
        };
        left += component.weight;
        for (total, v) in totals.iter_mut().zip(normalise(&values, component.normalise, max_eps)) {
            *total += component.weight * v;
        }
    }
    totals.into_iter().map(|t| (left > 0.0).then(|| t * (configured / left))).collect()
}

/// Sets components to 0 if the component that they depend on is too low, in the order of `gates`.
///
/// The raw value moves to the detail `raw`, and the detail `gated` is set to 1. If the deciding component is masked, the gate is
/// undecided and the dependent component is masked, too.
pub fn apply_gates<'a>(group: &mut [BTreeMap<String, Component>], gates: impl IntoIterator<Item = &'a Gate>) {
    for gate in gates {
        for response in group.iter_mut() {
            let deciding = response.get(&gate.needs).map(|c| c.value);
            let (Some(deciding), Some(c)) = (deciding, response.get_mut(&gate.component)) else { continue };
            match (deciding, c.value) {
                (_, None) => {}
                (None, Some(raw)) => {
                    c.detail.insert("raw".to_owned(), raw);
                    c.value = None;
                    c.masked = true;
                    c.reason = Some(MaskReason::Failed(format!("its gate `{}` is masked", gate.needs)));
                }
                (Some(v), Some(raw)) if v < gate.at_least || v.is_nan() => {
                    c.detail.insert("raw".to_owned(), raw);
                    c.detail.insert("gated".to_owned(), 1.0);
                    c.value = Some(0.0);
                }
                _ => {}
            }
        }
    }
}

/// Applies the mask rule to one component of a group.
fn mask_group(group: &mut [BTreeMap<String, Component>], name: &str) {
    for c in group.iter_mut().filter_map(|r| r.get_mut(name)) {
        if c.value.is_some_and(|v| !v.is_finite()) {
            *c = Component::masked(MaskReason::Failed("the value is not finite".into()));
        }
    }
    if !group.iter().any(|r| r.get(name).is_none_or(|c| c.masked || c.value.is_none())) {
        return;
    }
    for response in group {
        let c = response.entry(name.to_owned()).or_insert_with(|| Component::masked(MaskReason::GroupMasked));
        if let Some(raw) = c.value.take() {
            c.detail.insert("raw".to_owned(), raw);
        }
        // The reason of an unmasked component is a remark on its value.
        if !std::mem::replace(&mut c.masked, true) {
            c.reason = None;
        }
        c.reason.get_or_insert(MaskReason::GroupMasked);
    }
}

/// Normalises the values of one component over a group.
///
/// `Max`: divided by the largest; all 0 if the largest is not above `max_eps`. `Zscore`: minus the mean, divided by the population
/// standard deviation; all 0 if they are equal.
pub fn normalise(values: &[f64], method: Normalise, max_eps: f64) -> Vec<f64> {
    match method {
        Normalise::None => values.to_vec(),
        Normalise::Max => {
            let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            values.iter().map(|v| if most > max_eps { v / most } else { 0.0 }).collect()
        }
        Normalise::Zscore => {
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
            let flat = std <= 1e-9 * mean.abs().max(1e-3);
            values.iter().map(|v| if flat { 0.0 } else { (v - mean) / std }).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weighted(name: &str, weight: f64) -> WeightedComponent<'_> {
        WeightedComponent { name, weight, normalise: Normalise::None }
    }

    fn response(values: &[(&str, Option<f64>)]) -> BTreeMap<String, Component> {
        let component = |v: Option<f64>| v.map_or_else(|| Component::masked(MaskReason::NoAttention), Component::value);
        values.iter().map(|(n, v)| ((*n).to_owned(), component(*v))).collect()
    }

    #[test]
    fn mask_spreads_over_the_group_and_weights_are_rescaled() {
        let mut g = [response(&[("a", Some(0.5)), ("b", Some(1.0))]), response(&[("a", Some(1.0)), ("b", None)])];
        let totals = compose(&mut g, &[weighted("a", 1.0), weighted("b", 0.5)], 1e-6);
        assert_eq!(totals, vec![Some(0.75), Some(1.5)]);
        assert_eq!(g[0]["b"].reason, Some(MaskReason::GroupMasked));
        assert_eq!((g[0]["b"].value, g[0]["b"].detail["raw"]), (None, 1.0));
        assert_eq!(g[1]["b"].reason, Some(MaskReason::NoAttention));
    }

    #[test]
    fn gates_pass_zero_or_mask_a_component() {
        let with_gate = |a: Option<f64>| response(&[("a", a), ("b", Some(0.7))]);
        let mut g = [with_gate(Some(1.0)), with_gate(Some(0.5)), with_gate(None)];
        apply_gates(&mut g, &[Gate { component: "b".into(), needs: "a".into(), at_least: 1.0 }]);
        assert_eq!(g.each_ref().map(|r| r["b"].value), [Some(0.7), Some(0.0), None]);
        assert_eq!((g[1]["b"].detail["gated"], g[1]["b"].detail["raw"]), (1.0, 0.7));
        assert!(g[2]["b"].masked && matches!(&g[2]["b"].reason, Some(MaskReason::Failed(w)) if w.contains("`a`")));
    }

    #[test]
    fn total_is_none_without_weighted_components() {
        let mut g = [response(&[("a", None), ("b", Some(1.0))])];
        assert_eq!(compose(&mut g, &[weighted("a", 1.0), weighted("b", 0.0)], 1e-6), vec![None]);
        assert_eq!(g[0]["b"].value, Some(1.0));
    }

    #[test]
    fn non_finite_values_are_masked() {
        let mut g = [response(&[("a", Some(f64::NAN))])];
        assert_eq!(compose(&mut g, &[weighted("a", 1.0)], 1e-6), vec![None]);
        assert!(matches!(g[0]["a"].reason, Some(MaskReason::Failed(_))));
    }

    #[test]
    fn normalisations() {
        assert_eq!(normalise(&[0.2, 0.4], Normalise::Max, 1e-6), vec![0.5, 1.0]);
        assert_eq!(normalise(&[0.0, 0.0], Normalise::Max, 1e-6), vec![0.0, 0.0]);
        assert_eq!(normalise(&[0.01, 0.02], Normalise::Max, 0.05), vec![0.0, 0.0]);
        assert_eq!(normalise(&[0.3, 0.3, 0.3], Normalise::Zscore, 1e-6), vec![0.0; 3]);
        assert_eq!(normalise(&[0.0, 1.0], Normalise::Zscore, 1e-6), vec![-1.0, 1.0]);
    }
}
