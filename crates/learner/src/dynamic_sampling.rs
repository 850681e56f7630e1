//! Dynamic sampling: which groups teach nothing and are replaced, and the end of a run that has nothing left to learn from.

use unveil_config::schema::Learner;
use unveil_core::{GroupId, TrainGroup};
use unveil_trainer::UpdateReport;

use crate::error::{LearnerError, Result};

/// Returns the test for a group from which the configured algorithm learns nothing.
pub(crate) fn uninformative(learner: &Learner) -> fn(&TrainGroup) -> bool {
    if learner.overlong_filter {
        |group: &TrainGroup| group.teaches_nothing(true)
    } else {
        |group: &TrainGroup| group.teaches_nothing(false)
    }
}

/// Checks that the batch of update `step` has something to teach, if `replaced` groups may be replaced for that.
///
/// # Errors
/// Returns [`LearnerError::NothingToLearn`] if groups are replaced, and the batch still holds nothing but groups that teach nothing.
pub(crate) fn check_batch(learner: &Learner, step: u64, batch: &[TrainGroup], replaced: &[GroupId]) -> Result<()> {
    let teaches_nothing = uninformative(learner);
    // A group without any reward is no reason to stop: what lacks may be available again.
    if learner.max_replaced == 0 || batch.is_empty() || !batch.iter().all(teaches_nothing) {
        return Ok(());
    }
    Err(LearnerError::NothingToLearn { step, groups: batch.len(), replaced: replaced.len() })
}

/// Writes the replaced groups to the report of an update.
pub(crate) fn add_to_report(report: &mut UpdateReport, replaced: &[GroupId]) {
    report.replaced = replaced.len();
    report.replaced_groups = replaced.iter().map(|g| g.record.clone()).collect();
}

#[cfg(test)]
mod tests {
    use unveil_config::Config;
    use unveil_core::{Finish, Response};

    use super::*;
    use crate::group_outcomes::group_of_one_response;

    /// Returns a group with these rewards.
    fn group(totals: &[Option<f64>]) -> TrainGroup {
        let mut group = group_of_one_response("a", None, Default::default());
        let response = group.responses[0].clone();
        let breakdown = group.breakdowns[0].clone();
        group.responses = (0..totals.len()).map(|index| Response { index, ..response.clone() }).collect();
        let with_total = |(index, total): (usize, &Option<f64>)| {
            let mut breakdown = breakdown.clone();
            (breakdown.index, breakdown.total) = (index, *total);
            breakdown
        };
        group.breakdowns = totals.iter().enumerate().map(with_total).collect();
        group
    }

    fn learner(max_replaced: usize, overlong_filter: bool) -> Learner {
        let mut learner = Config::default().learner;
        (learner.max_replaced, learner.overlong_filter) = (max_replaced, overlong_filter);
        learner
    }

    #[test]
    fn groups_of_equal_rewards_or_filtered_responses_teach_nothing() {
        let plain = uninformative(&learner(1, false));
        let filtering = uninformative(&learner(1, true));
        for (totals, flat) in [
            (&[Some(0.5), Some(0.5)][..], true),
            (&[Some(0.5), Some(0.1 + 0.4)], true),
            (&[Some(0.5), None], true),
            (&[Some(0.5), Some(0.6)], false),
            (&[None, None], false),
        ] {
            assert_eq!((plain(&group(totals)), filtering(&group(totals))), (flat, flat), "{totals:?}");
        }
        let mut cut = group(&[Some(0.5), Some(0.6)]);
        cut.responses[0].finish = Finish::Length;
        assert_eq!((plain(&cut), filtering(&cut)), (false, false), "one response is left");
        cut.responses[1].finish = Finish::Length;
        assert_eq!((plain(&cut), filtering(&cut)), (false, true));
    }

    #[test]
    fn a_batch_without_any_informative_group_ends_the_run() {
        let flat = group(&[Some(0.5), Some(0.5)]);
        let good = group(&[Some(0.5), Some(0.6)]);
        let masked = group(&[None, None]);
        let replaced = vec![flat.id.clone(); 3];
        let check = |batch: &[TrainGroup]| check_batch(&learner(3, false), 7, batch, &replaced);
        assert!(check(&[flat.clone(), good]).is_ok() && check(&[flat.clone(), masked]).is_ok());
        let text = check(&[flat.clone(), flat.clone()]).unwrap_err().to_string();
        for part in ["step 7", "5 groups", "3 of them", "learner.max_replaced", "rollouts/step-7.jsonl"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(check_batch(&learner(0, false), 7, &[flat], &[]).is_ok(), "off");
    }
}
