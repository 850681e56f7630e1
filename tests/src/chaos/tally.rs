//! What became of groups, counted from the event log and from the newest checkpoint's accounting, each on its own.

use serde_json::Value;
use unveil_testkit::Lineage;

/// Groups that were not trained once, and whether both sources agree that there are none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tally {
    pub lost: usize,
    pub doubled: usize,
    pub dropped: u64,
    pub wholly_masked: u64,
    pub skipped: u64,
    /// The accounting says that every group of every update was trained, and once.
    pub agrees: bool,
}

impl Tally {
    /// Of a lineage over so many records, with so many groups per update; `account` is what `checkpoint show` says.
    pub fn of(lineage: &Lineage, account: &Value, (records, groups): (usize, usize)) -> Self {
        let (doubled, lost) = lineage.doubled_and_lost(records);
        let said = |key: &str| account[key].as_u64().unwrap_or(0);
        let steps = &lineage.steps;
        let masked: usize = steps.iter().map(|s| s.wholly_masked).sum();
        let skipped: usize = steps.iter().filter(|s| s.skipped).map(|s| s.groups.len() - s.wholly_masked).sum();
        let gaps = steps.iter().zip(1..).any(|(s, n)| s.step != n || s.groups.len() != groups);
        let all = account["trained"].as_u64() == Some((steps.len() * groups) as u64);
        Self {
            lost,
            doubled,
            dropped: said("dropped"),
            wholly_masked: said("wholly_masked").max(masked as u64),
            skipped: said("skipped").max(skipped as u64),
            agrees: all && account["exactly_once"] == true && !gaps,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A run of four updates of two groups, as its event log has it.
    fn recorded(third: &Value) -> Lineage {
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

    fn account(trained: u64, more: &Value) -> Value {
        let mut all = json!({"trained": trained, "dropped": 0, "wholly_masked": 0, "skipped": 0, "exactly_once": true});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    }

    #[test]
    fn a_whole_run_has_nothing_to_tell() {
        let tally = Tally::of(&recorded(&json!({})), &account(8, &json!({})), (8, 2));
        assert_eq!(tally, Tally { lost: 0, doubled: 0, dropped: 0, wholly_masked: 0, skipped: 0, agrees: true });
    }

    /// The learner of old: a group without any reward enters an update, and its accounting says that all were trained. The event log
    /// alone has to tell.
    #[test]
    fn a_group_that_is_trained_as_nothing_is_seen_whatever_the_accounting_says() {
        let third = json!({"masked": {"total": 4, "localization": 4, "format": 4}});
        let tally = Tally::of(&recorded(&third), &account(8, &json!({})), (8, 2));
        assert_eq!((tally.wholly_masked, tally.lost, tally.doubled, tally.agrees), (1, 0, 0, true), "{tally:?}");
    }

    #[test]
    fn each_way_of_not_being_trained_is_counted_apart() {
        let none = json!({});
        let not_once = |more: Value| {
            account(7, &{
                let mut more = more;
                more["exactly_once"] = false.into();
                more
            })
        };
        let skipped = json!({"skipped": "the loss is not finite"});
        let tally = Tally::of(&recorded(&skipped), &account(8, &none), (8, 2));
        assert_eq!((tally.skipped, tally.wholly_masked), (2, 0));
        let both = json!({"skipped": "every reward of the batch is masked", "masked": {"total": 8}});
        let tally = Tally::of(&recorded(&both), &account(8, &none), (8, 2));
        assert_eq!((tally.skipped, tally.wholly_masked), (0, 2));
        for (key, value) in [("dropped", 1), ("wholly_masked", 2), ("skipped", 3)] {
            let tally = Tally::of(&recorded(&none), &not_once(json!({key: value})), (8, 2));
            let found =
                json!({"dropped": tally.dropped, "wholly_masked": tally.wholly_masked, "skipped": tally.skipped});
            assert_eq!(found[key], value, "{tally:?}");
            assert!(!tally.agrees);
        }
        // Less in the accounting than in the log.
        assert!(!Tally::of(&recorded(&none), &account(6, &none), (8, 2)).agrees);
    }
}
