//! How many groups lose a component of their reward, or all of it, over a window of the last ones: a run whose rewards are mostly
//! missing trains something else than it was asked to, and stops. Must not know: tensors, services.

use std::collections::{BTreeMap, VecDeque};

use unveil_config::Config;
use unveil_core::MaskReason;

use crate::batch::TrainGroup;
use crate::error::{LearnerError, Result};

/// Groups of the window at least.
const GROUPS: usize = 64;
/// Updates of the window at least.
const UPDATES: usize = 4;
/// The name under which groups without any reward are counted.
const TOTAL: &str = "total";

/// The last groups, and what each of them lacks.
#[derive(Debug)]
pub(crate) struct Window {
    limit: f64,
    size: usize,
    /// Components that count.
    weighted: Vec<String>,
    /// By component, why it is masked.
    groups: VecDeque<BTreeMap<String, String>>,
}

impl Window {
    /// As configured.
    pub fn new(config: &Config) -> Self {
        let components = config.reward.components();
        let weighted = components.iter().filter(|(_, weight, _)| *weight > 0.0).map(|(name, ..)| (*name).to_owned());
        let size = GROUPS.max(config.learner.groups.saturating_mul(UPDATES));
        Self { limit: config.learner.max_masked, size, weighted: weighted.collect(), groups: VecDeque::new() }
    }

    /// A group was set aside.
    pub fn dropped(&mut self, why: &str) {
        self.push([(TOTAL.to_owned(), why.to_owned())].into());
    }

    /// Takes the batch of update `step` in.
    ///
    /// # Errors
    /// [`LearnerError::Masked`]: the window is full, and some component is masked for too many of its groups.
    pub fn take(&mut self, step: u64, batch: &[TrainGroup]) -> Result<()> {
        for group in batch {
            let lacks = self.lacks(group);
            self.push(lacks);
        }
        if self.groups.len() < self.size {
            return Ok(());
        }
        let mut found: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, why) in self.groups.iter().flatten() {
            found.entry(name).or_default().push(why);
        }
        let most = found.into_iter().max_by_key(|(_, reasons)| reasons.len());
        match most.filter(|(_, reasons)| reasons.len() as f64 > self.limit * self.groups.len() as f64) {
            None => Ok(()),
            Some((component, reasons)) => Err(LearnerError::Masked {
                step,
                component: component.to_owned(),
                masked: reasons.len(),
                groups: self.groups.len(),
                limit: self.limit,
                reason: commonest(&reasons).to_owned(),
            }),
        }
    }

    fn push(&mut self, lacks: BTreeMap<String, String>) {
        self.groups.push_back(lacks);
        if self.groups.len() > self.size {
            self.groups.pop_front();
        }
    }

    /// Components with a weight that are masked for the group though they apply to it, and why.
    fn lacks(&self, group: &TrainGroup) -> BTreeMap<String, String> {
        let mut out: BTreeMap<String, String> = BTreeMap::new();
        for name in &self.weighted {
            let parts: Vec<_> = group.breakdowns.iter().filter_map(|b| b.components.get(name)).collect();
            if parts.is_empty() || parts.iter().any(|c| c.value.is_some() && !c.masked) {
                continue;
            }
            let own = parts.iter().filter_map(|c| c.reason.as_ref()).find(|r| **r != MaskReason::GroupMasked);
            if own != Some(&MaskReason::NotApplicable) {
                out.insert(name.clone(), own.map_or_else(|| "no reason is given".to_owned(), told));
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

/// A reason in words.
fn told(reason: &MaskReason) -> String {
    match reason {
        MaskReason::NotApplicable => "it does not apply".to_owned(),
        MaskReason::NoAttention => "attention was not sent, or does not fit the response".to_owned(),
        MaskReason::GroupMasked => "it is masked for another response".to_owned(),
        MaskReason::Failed(why) => format!("it failed: {why}"),
        MaskReason::Unavailable(why) => format!("it could not be had: {why}"),
    }
}

/// The reason that comes most often; the last one of these.
fn commonest<'a>(reasons: &[&'a str]) -> &'a str {
    let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (at, why) in reasons.iter().enumerate() {
        let count = counts.entry(why).or_default();
        *count = (count.0 + 1, at);
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map_or("", |(why, _)| why)
}

#[cfg(test)]
mod tests {
    use unveil_core::Component;

    use super::*;
    use crate::batch::one_response;

    fn group(total: Option<f64>, components: &[(&str, Component)]) -> TrainGroup {
        let components = components.iter().map(|(n, c)| ((*n).to_owned(), c.clone())).collect();
        one_response("r", total, components)
    }

    fn window(limit: f64) -> Window {
        let mut config = Config::default();
        (config.learner.max_masked, config.learner.groups) = (limit, 8);
        Window::new(&config)
    }

    fn masked(reason: MaskReason) -> Component {
        Component::masked(reason)
    }

    #[test]
    fn a_component_that_is_mostly_missing_stops_the_run_and_is_named_with_its_reason() {
        let good = group(Some(1.0), &[("category", Component::value(1.0)), ("format", Component::value(1.0))]);
        let away = MaskReason::Unavailable("the judge: 503".into());
        let bad = group(Some(0.1), &[("category", masked(away)), ("format", Component::value(1.0))]);
        let batch = |bad_ones: usize| -> Vec<TrainGroup> {
            (0..8).map(|i| if i < bad_ones { bad.clone() } else { good.clone() }).collect()
        };
        let mut w = window(0.5);
        // Four of eight are the limit, five are too many; and nothing is judged before the window is full.
        for step in 0..20 {
            w.take(step, &batch(4)).unwrap();
        }
        let mut w = window(0.5);
        for step in 0..7 {
            w.take(step, &batch(5)).unwrap();
        }
        let text = w.take(7, &batch(5)).unwrap_err().to_string();
        for part in ["step 7", "`category`", "40 of the last 64 groups", "0.5", "learner.max_masked", "the judge: 503"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        let mut w = window(1.0);
        (0..20).for_each(|step| w.take(step, &batch(8)).unwrap());
    }

    #[test]
    fn what_does_not_apply_is_not_missing_and_what_is_set_aside_is() {
        let text_task = group(None, &[("category", masked(MaskReason::NotApplicable))]);
        let mut w = window(0.0);
        (0..200).for_each(|step| w.take(step, std::slice::from_ref(&text_task)).unwrap());
        // A component without a weight says nothing about what is trained.
        let unweighed = group(Some(1.0), &[("nobody", masked(MaskReason::NoAttention))]);
        (0..200).for_each(|step| w.take(step, std::slice::from_ref(&unweighed)).unwrap());
        let mut w = window(0.5);
        (0..40).for_each(|_| w.dropped("it killed three workers"));
        let batch = vec![text_task; 24];
        let text = w.take(1, &batch).unwrap_err().to_string();
        assert!(text.contains("`total`") && text.contains("killed three workers"), "{text}");
        let wholly =
            group(None, &[("format", masked(MaskReason::GroupMasked)), ("category", masked(MaskReason::NoAttention))]);
        let mut w = window(0.5);
        let text = w.take(1, &vec![wholly; 64]).unwrap_err().to_string();
        assert!(text.contains("64 of the last 64"), "{text}");
    }
}
