//! Outcomes of the groups of a batch, as the experience server accounts for them.

use unveil_core::{GroupId, TrainGroup};
use unveil_experience::GroupOutcome;
use unveil_trainer::UpdateReport;

/// Returns what became of each group of the `batch` of an update; `overlong_filter` is the setting of the learner.
pub(crate) fn group_outcomes(
    report: &UpdateReport,
    batch: &[TrainGroup],
    overlong_filter: bool,
) -> Vec<(GroupId, GroupOutcome)> {
    let outcome = |g: &TrainGroup| match &report.skipped {
        _ if !g.is_rewarded() => GroupOutcome::Masked,
        _ if g.responses_in_loss(overlong_filter).is_empty() => GroupOutcome::Filtered,
        Some(_) => GroupOutcome::Skipped,
        None => GroupOutcome::Trained,
    };
    batch.iter().map(|g| (g.id.clone(), outcome(g))).collect()
}

/// Returns a group of one response, for tests.
#[cfg(test)]
pub(crate) fn group_of_one_response(
    record: &str,
    total: Option<f64>,
    components: std::collections::BTreeMap<String, unveil_core::Component>,
) -> TrainGroup {
    use unveil_core::{Breakdown, Finish, Grid, GroupInput, Response};

    let input = GroupInput {
        record: serde_json::from_value(serde_json::json!({"id": record})).unwrap(),
        image_size: (8, 8),
        prompt: Default::default(),
        patches: vec![],
        merged: Grid { rows: 1, cols: 1 },
        encoded: Default::default(),
    };
    TrainGroup {
        id: GroupId { pass: 0, position: 0, record: record.into() },
        worker: "w".into(),
        input: std::sync::Arc::new(input),
        responses: vec![Response {
            index: 0,
            tokens: vec![1],
            text: "x".into(),
            logprobs: vec![-0.5],
            versions: vec![0],
            finish: Finish::Stop,
        }],
        spans: vec![],
        breakdowns: vec![Breakdown { id: record.into(), index: 0, total, components }],
        attention: vec![],
        generate_ms: 0.0,
        reward_ms: 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(record: &str, total: Option<f64>) -> TrainGroup {
        group_of_one_response(record, total, Default::default())
    }

    #[test]
    fn group_outcomes_of_trained_and_skipped_updates() {
        let batch = [group("a", Some(0.5)), group("b", None)];
        let outcomes = |skipped: Option<&str>| {
            let report = UpdateReport { skipped: skipped.map(str::to_owned), ..Default::default() };
            group_outcomes(&report, &batch, false)
                .into_iter()
                .map(|(id, outcome)| (id.record, outcome))
                .collect::<Vec<_>>()
        };
        assert_eq!(outcomes(None), [("a".to_owned(), GroupOutcome::Trained), ("b".to_owned(), GroupOutcome::Masked)]);
        let skipped = outcomes(Some("the loss is not finite"));
        assert_eq!(skipped, [("a".to_owned(), GroupOutcome::Skipped), ("b".to_owned(), GroupOutcome::Masked)]);
    }

    #[test]
    fn groups_of_cut_responses_are_filtered() {
        let mut cut = group("a", Some(0.5));
        cut.responses[0].finish = unveil_core::Finish::Length;
        let batch = [cut, group("b", Some(0.5))];
        let outcomes = |filter| {
            let outcomes = group_outcomes(&UpdateReport::default(), &batch, filter);
            outcomes.into_iter().map(|(_, outcome)| outcome).collect::<Vec<_>>()
        };
        assert_eq!(outcomes(false), [GroupOutcome::Trained, GroupOutcome::Trained]);
        assert_eq!(outcomes(true), [GroupOutcome::Filtered, GroupOutcome::Trained]);
    }
}
