//! From components to a total: normalisation over the group, the mask rule, rescaled weights.
//!
//! Source: arXiv 2501.01377, total reward, with what cannot work as printed made explicit (masking, epsilon).

use std::collections::BTreeMap;

use unveil_config::schema::{Gate, Normalise};
use unveil_core::{Component, MaskReason};

/// How one component enters the total.
#[derive(Debug, Clone, PartialEq)]
pub struct Part<'a> {
    /// Component name.
    pub name: &'a str,
    /// Weight, 0 or more; 0 = reported, not in the total.
    pub weight: f64,
    /// Normalisation over the group.
    pub normalise: Normalise,
}

/// Totals of a group's responses; masks what has to be masked in `group` on the way.
///
/// - A component masked for one response is masked for the whole group (`GroupMasked`; its raw value moves to the detail
///   `raw`). A value that is not finite counts as failed.
/// - `total = W / sum(w of what is left) * sum(w * normalised value)`, W = sum of all configured weights.
/// - `None` for all when nothing with a weight is left.
///
/// Range: `[0, W]` for values in `[0, 1]` under `none` and `max`; z-scores are centred on 0.
pub fn compose(group: &mut [BTreeMap<String, Component>], parts: &[Part<'_>], max_eps: f64) -> Vec<Option<f64>> {
    let mut totals = vec![0.0; group.len()];
    let (mut configured, mut left) = (0.0, 0.0);
    for part in parts {
        mask_group(group, part.name);
        configured += part.weight;
        let values: Option<Vec<f64>> = group.iter().map(|c| c.get(part.name)?.value).collect();
        let Some(values) = values.filter(|_| part.weight > 0.0) else {
            continue;
        };
        left += part.weight;
        for (total, v) in totals.iter_mut().zip(normalised(&values, part.normalise, max_eps)) {
            *total += part.weight * v;
        }
    }
    totals.into_iter().map(|t| (left > 0.0).then(|| t * (configured / left))).collect()
}

/// Sets components to 0 where the component that they depend on is too low, in the order of `gates`.
///
/// The raw value moves to the detail `raw`, and the detail `gated` is 1. Where the deciding component is masked nobody knows, so the
/// other is masked, too.
pub fn apply_gates<'a>(group: &mut [BTreeMap<String, Component>], gates: impl IntoIterator<Item = &'a Gate>) {
    for gate in gates {
        for response in group.iter_mut() {
            let decides = response.get(&gate.needs).map(|c| c.value);
            let (Some(decides), Some(c)) = (decides, response.get_mut(&gate.component)) else { continue };
            match (decides, c.value) {
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

/// Applies the mask rule for one component.
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
        c.masked = true;
        c.reason.get_or_insert(MaskReason::GroupMasked);
    }
}

/// Values of one component over a group, normalised.
///
/// `Max`: divided by the largest; all 0 when the largest is not above `max_eps`. `Zscore`: minus the mean, over the population
/// standard deviation; all 0 when they are equal.
pub fn normalised(values: &[f64], how: Normalise, max_eps: f64) -> Vec<f64> {
    match how {
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

    fn part(name: &str, weight: f64) -> Part<'_> {
        Part { name, weight, normalise: Normalise::None }
    }

    fn response(parts: &[(&str, Option<f64>)]) -> BTreeMap<String, Component> {
        let component = |v: Option<f64>| v.map_or_else(|| Component::masked(MaskReason::NoAttention), Component::value);
        parts.iter().map(|(n, v)| ((*n).to_owned(), component(*v))).collect()
    }

    #[test]
    fn masked_for_one_is_masked_for_all_and_weights_are_rescaled() {
        let mut g = [response(&[("a", Some(0.5)), ("b", Some(1.0))]), response(&[("a", Some(1.0)), ("b", None)])];
        let totals = compose(&mut g, &[part("a", 1.0), part("b", 0.5)], 1e-6);
        assert_eq!(totals, vec![Some(0.75), Some(1.5)]);
        assert_eq!(g[0]["b"].reason, Some(MaskReason::GroupMasked));
        assert_eq!((g[0]["b"].value, g[0]["b"].detail["raw"]), (None, 1.0));
        assert_eq!(g[1]["b"].reason, Some(MaskReason::NoAttention));
    }

    #[test]
    fn gates_let_through_set_to_zero_or_mask() {
        let one = |a: Option<f64>| response(&[("a", a), ("b", Some(0.7))]);
        let mut g = [one(Some(1.0)), one(Some(0.5)), one(None)];
        apply_gates(&mut g, &[Gate { component: "b".into(), needs: "a".into(), at_least: 1.0 }]);
        assert_eq!(g.each_ref().map(|r| r["b"].value), [Some(0.7), Some(0.0), None]);
        assert_eq!((g[1]["b"].detail["gated"], g[1]["b"].detail["raw"]), (1.0, 0.7));
        assert!(g[2]["b"].masked && matches!(&g[2]["b"].reason, Some(MaskReason::Failed(w)) if w.contains("`a`")));
    }

    #[test]
    fn all_masked_has_no_total_and_weight_zero_is_only_reported() {
        let mut g = [response(&[("a", None), ("b", Some(1.0))])];
        assert_eq!(compose(&mut g, &[part("a", 1.0), part("b", 0.0)], 1e-6), vec![None]);
        assert_eq!(g[0]["b"].value, Some(1.0));
    }

    #[test]
    fn values_that_are_not_finite_are_masked() {
        let mut g = [response(&[("a", Some(f64::NAN))])];
        assert_eq!(compose(&mut g, &[part("a", 1.0)], 1e-6), vec![None]);
        assert!(matches!(g[0]["a"].reason, Some(MaskReason::Failed(_))));
    }

    #[test]
    fn normalisations() {
        assert_eq!(normalised(&[0.2, 0.4], Normalise::Max, 1e-6), vec![0.5, 1.0]);
        assert_eq!(normalised(&[0.0, 0.0], Normalise::Max, 1e-6), vec![0.0, 0.0]);
        assert_eq!(normalised(&[0.01, 0.02], Normalise::Max, 0.05), vec![0.0, 0.0]);
        assert_eq!(normalised(&[0.3, 0.3, 0.3], Normalise::Zscore, 1e-6), vec![0.0; 3]);
        assert_eq!(normalised(&[0.0, 1.0], Normalise::Zscore, 1e-6), vec![-1.0, 1.0]);
    }
}
