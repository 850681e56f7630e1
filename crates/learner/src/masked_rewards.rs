//! Counts groups that lack a component of their reward, or all of it, in a sliding window: a run whose rewards are mostly missing
//! would train something other than what was configured, so it stops.

use std::collections::{BTreeMap, VecDeque};

use unveil_config::Config;
use unveil_core::{MaskReason, TrainGroup};

use crate::error::{LearnerError, Result};

/// Minimum size of the window in groups.
const MIN_GROUPS: usize = 64;
/// Minimum size of the window in updates.
const MIN_UPDATES: usize = 4;
/// Name under which groups without any reward are counted.
const TOTAL: &str = "total";

/// The last groups, with the reward components that each of them lacks.
#[derive(Debug)]
pub(crate) struct MaskedRewardWindow {
    limit: f64,
    size: usize,
    /// Components with a weight above 0.
    weighted: Vec<String>,
    /// Per group, the masked components and why they are masked.
    groups: VecDeque<BTreeMap<String, String>>,
}

impl MaskedRewardWindow {
    /// Reads `learner.max_masked`, the batch size and the reward weights.
    pub(crate) fn new(config: &Config) -> Self {
        let components = config.reward.components();
        let weighted = components.iter().filter(|(_, weight, _)| *weight > 0.0).map(|(name, ..)| (*name).to_owned());
        let size = MIN_GROUPS.max(config.learner.groups.saturating_mul(MIN_UPDATES));
        Self { limit: config.learner.max_masked, size, weighted: weighted.collect(), groups: VecDeque::new() }
    }

    /// Records a group that was set aside.
    pub(crate) fn record_dropped(&mut self, why: &str) {
        self.push([(TOTAL.to_owned(), why.to_owned())].into());
    }

    /// Records the batch of update `step`.
    ///
    /// # Errors
    /// Returns [`LearnerError::Masked`] if the window is full and a component is masked for too many of its groups.
    pub(crate) fn record_batch(&mut self, step: u64, batch: &[TrainGroup]) -> Result<()> {
        for group in batch {
            let missing = self.missing_components(group);
            self.push(missing);
        }
        if self.groups.len() < self.size {
            return Ok(());
        }
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, why) in self.groups.iter().flatten() {
            reasons.entry(name).or_default().push(why);
        }
        let most = reasons.into_iter().max_by_key(|(_, reasons)| reasons.len());
        match most.filter(|(_, reasons)| reasons.len() as f64 > self.limit * self.groups.len() as f64) {
            None => Ok(()),
            Some((component, reasons)) => Err(LearnerError::Masked {
                step,
                component: component.to_owned(),
                masked: reasons.len(),
                groups: self.groups.len(),
                limit: self.limit,
                reason: most_frequent(&reasons).to_owned(),
            }),
        }
    }

    fn push(&mut self, missing: BTreeMap<String, String>) {
        self.groups.push_back(missing);
        if self.groups.len() > self.size {
            self.groups.pop_front();
        }
    }

    /// Returns the weighted components that apply to the group but are masked for it, and why.
    fn missing_components(&self, group: &TrainGroup) -> BTreeMap<String, String> {
        let mut out: BTreeMap<String, String> = BTreeMap::new();
        for name in &self.weighted {
            let components: Vec<_> = group.breakdowns.iter().filter_map(|b| b.components.get(name)).collect();
            if components.is_empty() || components.iter().any(|c| c.value.is_some() && !c.masked) {
                continue;
            }
            let reason = components.iter().filter_map(|c| c.reason.as_ref()).find(|r| **r != MaskReason::GroupMasked);
            if reason != Some(&MaskReason::NotApplicable) {
                let why = reason.map_or_else(|| "no reason is given".to_owned(), describe);
                out.insert(name.clone(), why);
            }
        }
        if !group.is_rewarded()
            && let Some((name, why)) = out.iter().next()
        {
            out.insert(TOTAL.to_owned(), format!("`{name}`: {why}"));
        }
        out
    }
}

/// Describes a reason in words.
fn describe(reason: &MaskReason) -> String {
    match reason {
        MaskReason::NotApplicable => "it does not apply".to_owned(),
        MaskReason::NoAttention => "attention was not sent, or does not fit the response".to_owned(),
        MaskReason::GroupMasked => "it is masked for another response".to_owned(),
        MaskReason::Failed(why) => format!("it failed: {why}"),
        MaskReason::Unavailable(why) => format!("it is unavailable: {why}"),
        MaskReason::Form(rule) => rule.to_string(),
    }
}

/// Returns the most frequent reason; of several, the one seen last.
fn most_frequent<'a>(reasons: &[&'a str]) -> &'a str {
    let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (index, why) in reasons.iter().enumerate() {
        let count = counts.entry(why).or_default();
        *count = (count.0 + 1, index);
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map_or("", |(why, _)| why)
}

#[cfg(test)]
mod tests {
    use unveil_core::Component;

    use super::*;
    use crate::group_outcomes::group_of_one_response;

    fn group(total: Option<f64>, components: &[(&str, Component)]) -> TrainGroup {
        let components = components.iter().map(|(n, c)| ((*n).to_owned(), c.clone())).collect();
        group_of_one_response("r", total, components)
    }

    fn window(limit: f64) -> MaskedRewardWindow {
        let mut config = Config::default();
        config.learner.max_masked = limit;
        config.learner.groups = 8;
        MaskedRewardWindow::new(&config)
    }

    fn masked(reason: MaskReason) -> Component {
        Component::masked(reason)
    }

    #[test]
    fn mostly_missing_component_stops_the_run() {
        let good = group(Some(1.0), &[("category", Component::value(1.0)), ("format", Component::value(1.0))]);
        let unavailable = MaskReason::Unavailable("the judge: 503".into());
        let blind = group(Some(0.1), &[("category", masked(unavailable)), ("format", Component::value(1.0))]);
        let batch = |blind_count: usize| -> Vec<TrainGroup> {
            (0..8).map(|i| if i < blind_count { blind.clone() } else { good.clone() }).collect()
        };
        let mut w = window(0.5);
        // Four of eight are the limit and five too many, but nothing is checked before the window is full.
        for step in 0..20 {
            w.record_batch(step, &batch(4)).unwrap();
        }
        let mut w = window(0.5);
        for step in 0..7 {
            w.record_batch(step, &batch(5)).unwrap();
        }
        let text = w.record_batch(7, &batch(5)).unwrap_err().to_string();
        for part in ["step 7", "`category`", "40 of the last 64 groups", "0.5", "learner.max_masked", "the judge: 503"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        let mut w = window(1.0);
        (0..20).for_each(|step| w.record_batch(step, &batch(8)).unwrap());
    }

    #[test]
    fn inapplicable_components_do_not_count_but_dropped_groups_do() {
        let text_task = group(None, &[("category", masked(MaskReason::NotApplicable))]);
        let mut w = window(0.0);
        (0..200).for_each(|step| w.record_batch(step, std::slice::from_ref(&text_task)).unwrap());
        // A component without a weight does not affect training.
        let unweighed = group(Some(1.0), &[("unknown", masked(MaskReason::NoAttention))]);
        (0..200).for_each(|step| w.record_batch(step, std::slice::from_ref(&unweighed)).unwrap());
        let mut w = window(0.5);
        (0..40).for_each(|_| w.record_dropped("it killed three workers"));
        let batch = vec![text_task; 24];
        let text = w.record_batch(1, &batch).unwrap_err().to_string();
        assert!(text.contains("`total`") && text.contains("killed three workers"), "{text}");
        let wholly =
            group(None, &[("format", masked(MaskReason::GroupMasked)), ("category", masked(MaskReason::NoAttention))]);
        let mut w = window(0.5);
        let text = w.record_batch(1, &vec![wholly; 64]).unwrap_err().to_string();
        assert!(text.contains("64 of the last 64"), "{text}");
    }
}
