//! Fate of the groups, counted independently from the event log and from the accounting of the newest checkpoint.

use serde_json::Value;
use unveil_testkit::Lineage;

/// Groups that were not trained exactly once, and whether both sources agree that there are none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GroupTally {
    pub lost: usize,
    pub duplicated: usize,
    pub dropped: u64,
    pub wholly_masked: u64,
    pub skipped: u64,
    /// Whether the accounting confirms that every group of every update was trained exactly once.
    pub agrees: bool,
}

impl GroupTally {
    /// Counts the groups of a lineage with the given numbers of records and of groups per update; `accounting` is the one in
    /// `checkpoint show`.
    pub(super) fn new(lineage: &Lineage, accounting: &Value, (records, groups): (usize, usize)) -> Self {
        let (duplicated, lost) = lineage.count_duplicated_and_lost(records);
        let counted = |key: &str| accounting[key].as_u64().unwrap_or(0);
        let steps = &lineage.steps;
        let masked: usize = steps.iter().map(|s| s.wholly_masked).sum();
        let skipped: usize = steps.iter().filter(|s| s.skipped).map(|s| s.groups.len() - s.wholly_masked).sum();
        let gaps = steps.iter().zip(1..).any(|(s, n)| s.step != n || s.groups.len() != groups);
        let all_trained = accounting["trained"].as_u64() == Some((steps.len() * groups) as u64);
        Self {
            lost,
            duplicated,
            dropped: counted("dropped"),
            wholly_masked: counted("wholly_masked").max(masked as u64),
            skipped: counted("skipped").max(skipped as u64),
            agrees: all_trained && accounting["exactly_once"] == true && !gaps,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Returns the lineage of four updates of two groups, with `third` added to the third event.
    fn lineage_with(third: &Value) -> Lineage {
        let dir = std::env::temp_dir().join(format!("unveil-tally-{}-{:p}", std::process::id(), third));
        std::fs::create_dir_all(&dir).unwrap();
        let train = |step: u64, groups: [&str; 2]| json!({"kind": "train", "term": 1, "step": step, "pass": 0, "groups": groups, "responses": 8, "reward": {"total": 0.5}});
        let mut events = vec![json!({"kind": "started", "stage": "rl", "step": 0, "term": 1})];
        events.extend((1..).zip([["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]).map(|(n, g)| train(n, g)));
        events[3].as_object_mut().unwrap().extend(third.as_object().unwrap().clone());
        let text: String = events.iter().map(|e| format!("{e}\n")).collect();
        std::fs::write(dir.join("events.jsonl"), text).unwrap();
        let lineage = Lineage::read(&dir);
        std::fs::remove_dir_all(&dir).unwrap();
        lineage
    }

    fn accounting(trained: u64, more: &Value) -> Value {
        let mut all = json!({"trained": trained, "dropped": 0, "wholly_masked": 0, "skipped": 0, "exactly_once": true});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    }

    #[test]
    fn complete_runs_have_an_empty_tally() {
        let tally = GroupTally::new(&lineage_with(&json!({})), &accounting(8, &json!({})), (8, 2));
        assert_eq!(
            tally,
            GroupTally { lost: 0, duplicated: 0, dropped: 0, wholly_masked: 0, skipped: 0, agrees: true }
        );
    }

    /// A group without any reward enters an update, and the accounting claims that all were trained: the event log alone shows it.
    #[test]
    fn groups_without_rewards_are_found_in_the_event_log() {
        let third = json!({"masked": {"total": 4, "localization": 4, "format": 4}});
        let tally = GroupTally::new(&lineage_with(&third), &accounting(8, &json!({})), (8, 2));
        assert_eq!((tally.wholly_masked, tally.lost, tally.duplicated, tally.agrees), (1, 0, 0, true), "{tally:?}");
    }

    #[test]
    fn untrained_groups_are_counted_by_reason() {
        let none = json!({});
        let not_once = |more: Value| {
            accounting(7, &{
                let mut more = more;
                more["exactly_once"] = false.into();
                more
            })
        };
        let skipped = json!({"skipped": "the loss is not finite"});
        let tally = GroupTally::new(&lineage_with(&skipped), &accounting(8, &none), (8, 2));
        assert_eq!((tally.skipped, tally.wholly_masked), (2, 0));
        let both = json!({"skipped": "every reward of the batch is masked", "masked": {"total": 8}});
        let tally = GroupTally::new(&lineage_with(&both), &accounting(8, &none), (8, 2));
        assert_eq!((tally.skipped, tally.wholly_masked), (0, 2));
        for (key, value) in [("dropped", 1), ("wholly_masked", 2), ("skipped", 3)] {
            let tally = GroupTally::new(&lineage_with(&none), &not_once(json!({key: value})), (8, 2));
            let counts =
                json!({"dropped": tally.dropped, "wholly_masked": tally.wholly_masked, "skipped": tally.skipped});
            assert_eq!(counts[key], value, "{tally:?}");
            assert!(!tally.agrees);
        }
        // The accounting has fewer groups than the log.
        assert!(!GroupTally::new(&lineage_with(&none), &accounting(6, &none), (8, 2)).agrees);
    }
}
