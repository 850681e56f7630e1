//! Soft overlong punishment: a reward of at most 0 for responses near the length limit, in tokens, which is added to the total.

use std::collections::BTreeMap;

use unveil_core::{Component, MaskReason};

use crate::scoring::Scoring;

/// Name of the component.
pub(crate) const OVERLONG: &str = "overlong";

/// Returns the soft overlong punishment of a response of `tokens` tokens (DAPO, arXiv 2503.14476, eq. 13): 0 up to
/// `max_tokens - interval` tokens, from there falling linearly to -1 at `max_tokens`, and -1 beyond. Range `[-1, 0]`.
///
/// # Examples
/// ```
/// use unveil_reward::overlong::soft_overlong_punishment;
///
/// let lengths = [80, 90, 100, 101];
/// assert_eq!(lengths.map(|tokens| soft_overlong_punishment(tokens, 100, 20)), [0.0, -0.5, -1.0, -1.0]);
/// ```
pub fn soft_overlong_punishment(tokens: usize, max_tokens: usize, interval: usize) -> f64 {
    let beyond = tokens.saturating_sub(max_tokens.saturating_sub(interval));
    0.0 - (beyond as f64 / interval.max(1) as f64).min(1.0)
}

/// Adds the configured punishment to the components of a group's responses and, times its weight, to their totals; `lengths` are the
/// numbers of their tokens. It is masked, and the totals stay as they are, if one of them is unknown.
pub(crate) fn punish(
    scoring: &Scoring,
    lengths: &[Option<usize>],
    totals: &mut [Option<f64>],
    components: &mut [BTreeMap<String, Component>],
) {
    let rule = &scoring.reward.overlong;
    if rule.weight <= 0.0 {
        return;
    }
    let all_known = lengths.iter().all(Option::is_some);
    for ((length, total), components) in lengths.iter().zip(totals).zip(components) {
        let component = match *length {
            Some(tokens) if all_known => {
                let value = soft_overlong_punishment(tokens, scoring.max_tokens, rule.interval_tokens);
                *total = total.map(|t| t + rule.weight * value);
                Component::value(value).with_detail("tokens", tokens as f64).with_version("overlong-1")
            }
            Some(_) => Component::masked(MaskReason::GroupMasked),
            None => Component::masked(MaskReason::Failed("the number of its tokens is unknown".to_owned())),
        };
        components.insert(OVERLONG.to_owned(), component);
    }
}

#[cfg(test)]
mod tests {
    use unveil_config::Config;

    use super::*;

    fn scoring(weight: f64) -> Scoring {
        let mut config = Config::default();
        config.rollout.max_new_tokens = 10;
        config.reward.overlong.weight = weight;
        config.reward.overlong.interval_tokens = 4;
        Scoring::new(&config)
    }

    fn punished(weight: f64, lengths: &[Option<usize>]) -> (Vec<Option<f64>>, Vec<BTreeMap<String, Component>>) {
        let mut totals = vec![Some(1.5); lengths.len()];
        totals[0] = None;
        let mut components = vec![BTreeMap::new(); lengths.len()];
        punish(&scoring(weight), lengths, &mut totals, &mut components);
        (totals, components)
    }

    #[test]
    fn the_punishment_is_added_to_totals() {
        let (totals, components) = punished(0.5, &[Some(10), Some(6), Some(7), Some(10), Some(99)]);
        assert_eq!(totals, [None, Some(1.5), Some(1.375), Some(1.0), Some(1.0)], "a masked total stays masked");
        let values: Vec<Option<f64>> = components.iter().map(|c| c[OVERLONG].value).collect();
        assert_eq!(values, [Some(-1.0), Some(0.0), Some(-0.25), Some(-1.0), Some(-1.0)]);
        assert_eq!(components[2][OVERLONG].detail["tokens"], 7.0);
        assert!(values[1].is_some_and(f64::is_sign_positive), "0, not -0");
    }

    #[test]
    fn unknown_lengths_mask_it_for_the_group() {
        let (totals, components) = punished(0.5, &[Some(10), None, Some(7)]);
        assert_eq!(totals, [None, Some(1.5), Some(1.5)]);
        assert_eq!(components[0][OVERLONG].reason, Some(MaskReason::GroupMasked));
        assert!(matches!(&components[1][OVERLONG].reason, Some(MaskReason::Failed(why)) if why.contains("unknown")));
        let (totals, components) = punished(0.0, &[Some(10), Some(10)]);
        assert_eq!((totals[1], components[1].len()), (Some(1.5), 0), "off");
    }
}
