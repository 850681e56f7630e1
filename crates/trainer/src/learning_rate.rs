//! Learning rates: the schedule over the updates, and the rates of groups of parameters.

use unveil_config::schema::{Optimizer, Schedule};
use unveil_core::selects_parameter;

use crate::error::{Result, TrainerError};
use crate::freeze::CRITIC_PREFIX;

/// Returns the learning rate of update `step` (from 0) of `total`: linear warm-up, constant, then a fall from `lr` to `lr * lr_end` over
/// the last `decay` (a fraction) of the updates, as the schedule says.
pub fn lr_at(o: &Optimizer, step: u64, total: u64) -> f64 {
    let warmup_factor = ((step + 1) as f64 / o.warmup.max(1) as f64).min(1.0);
    o.lr * warmup_factor.min(decay_factor(o, step, total))
}

/// Returns the factor of the decay at update `step`.
fn decay_factor(o: &Optimizer, step: u64, total: u64) -> f64 {
    if o.decay <= 0.0 || o.schedule == Schedule::Constant {
        return 1.0;
    }
    let total = total as f64;
    let longest = if o.schedule == Schedule::Cosine { total - o.warmup as f64 } else { total };
    let steps = (o.decay * total).min(longest).max(1.0);
    let progress = ((step + 1) as f64 - (total - steps)).clamp(0.0, steps) / steps;
    let fallen = match o.schedule {
        Schedule::Cosine => (1.0 - (std::f64::consts::PI * progress).cos()) / 2.0,
        Schedule::Linear | Schedule::Constant => progress,
    };
    1.0 - fallen * (1.0 - o.lr_end)
}

/// Returns the learning rate of each parameter in `names` relative to `lr`.
///
/// # Errors
/// Returns [`TrainerError::Setting`] if a group selects no parameter.
pub(crate) fn relative_rates<'n>(o: &Optimizer, names: impl Iterator<Item = &'n str>) -> Result<Vec<f64>> {
    let mut matched = vec![false; o.groups.len()];
    let rates = names
        .map(|name| {
            let name = name.strip_prefix(CRITIC_PREFIX).unwrap_or(name);
            let selects = |index: usize| o.groups[index].parameters.iter().any(|s| selects_parameter(s, name));
            let mut selecting = (0..o.groups.len()).filter(|i| selects(*i)).inspect(|i| matched[*i] = true);
            let first = selecting.next();
            selecting.for_each(drop);
            first.map_or(1.0, |i| o.groups[i].lr / o.lr)
        })
        .collect();
    match matched.iter().position(|m| !m) {
        None => Ok(rates),
        Some(index) => Err(TrainerError::Setting(format!(
            "optimizer.groups, entry {index}: {:?} selects no parameter that is trained; use vision_tower, merger, language_model or prefixes \
             of parameter names",
            o.groups[index].parameters
        ))),
    }
}

#[cfg(test)]
mod tests {
    use unveil_config::schema::ParameterGroup;

    use super::*;

    #[test]
    fn learning_rate_schedule() {
        let o = Optimizer { lr: 1.0, warmup: 4, decay: 0.25, lr_end: 0.1, ..Default::default() };
        let at = |s| lr_at(&o, s, 20);
        assert_eq!((at(0), at(3), at(4), at(14)), (0.25, 1.0, 1.0, 1.0));
        assert!((at(19) - 0.1).abs() < 1e-12 && (at(500) - 0.1).abs() < 1e-12);
        assert!((15..20).all(|s| at(s) < at(s - 1)));
        assert_eq!(lr_at(&Optimizer { lr: 1.0, warmup: 0, decay: 0.0, ..o }, 0, 1), 1.0);
    }

    #[test]
    fn cosine_falls_from_the_end_of_the_warmup() {
        let o =
            Optimizer { lr: 2.0, warmup: 4, decay: 1.0, lr_end: 0.1, schedule: Schedule::Cosine, ..Default::default() };
        let at = |s| lr_at(&o, s, 20);
        // The rule of torch's CosineAnnealingLR over the 16 updates after the warm-up.
        let torch = |t: f64| 0.2 + (2.0 - 0.2) * (1.0 + (std::f64::consts::PI * t / 16.0).cos()) / 2.0;
        for s in 4..20 {
            assert!((at(s) - torch((s - 3) as f64)).abs() < 1e-12, "update {s}");
        }
        assert_eq!((at(0), at(3)), (0.5, 2.0));
        assert!((at(11) - 1.1).abs() < 1e-12 && (at(19) - 0.2).abs() < 1e-12 && (at(99) - 0.2).abs() < 1e-12);
        // A shorter decay leaves a plateau.
        let late = Optimizer { decay: 0.5, ..o.clone() };
        assert_eq!((lr_at(&late, 9, 20), lr_at(&late, 4, 20)), (2.0, 2.0));
        assert!(lr_at(&late, 10, 20) < 2.0);
        // A warm-up as long as the run leaves one update for the decay.
        assert!(lr_at(&Optimizer { warmup: 20, ..o }, 18, 20) > 1.8);
    }

    #[test]
    fn constant_rate_ignores_the_decay() {
        let o = Optimizer { lr: 1.0, warmup: 2, decay: 1.0, schedule: Schedule::Constant, ..Default::default() };
        assert_eq!((lr_at(&o, 0, 10), lr_at(&o, 1, 10), lr_at(&o, 9, 10)), (0.5, 1.0, 1.0));
    }

    fn group(parameters: &[&str], lr: f64) -> ParameterGroup {
        ParameterGroup { parameters: parameters.iter().map(|s| (*s).to_owned()).collect(), lr }
    }

    const NAMES: [&str; 4] =
        ["visual.blocks.0.norm1.weight", "visual.merger.mlp.0.weight", "critic.model.norm.weight", "value_head.weight"];

    #[test]
    fn first_group_that_selects_a_parameter_decides() {
        let groups = vec![group(&["merger", "value_head."], 4.0), group(&["visual.", "language_model"], 1.0)];
        let o = Optimizer { lr: 2.0, groups, ..Default::default() };
        assert_eq!(relative_rates(&o, NAMES.into_iter()).unwrap(), [0.5, 2.0, 0.5, 2.0]);
        assert_eq!(relative_rates(&Optimizer::default(), NAMES.into_iter()).unwrap(), [1.0; 4]);
    }

    #[test]
    fn group_without_parameters_is_named() {
        let o =
            Optimizer { groups: vec![group(&["visual."], 1.0), group(&["vision_towers"], 1.0)], ..Default::default() };
        let e = relative_rates(&o, NAMES.into_iter()).unwrap_err().to_string();
        assert!(e.contains("optimizer.groups, entry 1") && e.contains("vision_towers"), "{e}");
        // A group that earlier ones leave nothing is not wrong.
        let o = Optimizer { groups: vec![group(&["visual."], 1.0), group(&["merger"], 1.0)], ..Default::default() };
        assert_eq!(relative_rates(&o, NAMES.into_iter()).unwrap().len(), 4);
    }
}
