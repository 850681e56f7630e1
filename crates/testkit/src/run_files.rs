//! Readers of the files in a run directory.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

/// Reads a JSON file.
#[track_caller]
pub fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Parses JSON lines; blank lines are skipped.
#[track_caller]
pub fn json_lines(text: &str) -> Vec<Value> {
    let parse = |l: &str| serde_json::from_str(l).unwrap_or_else(|e| panic!("not a line of JSON ({e}): {l}"));
    text.lines().filter(|l| !l.trim().is_empty()).map(parse).collect()
}

/// Returns the events of a run so far: none without a file, and without an incomplete last line.
pub fn events(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("events.jsonl")).unwrap_or_default();
    text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
}

/// Returns the events of one kind.
pub fn events_of(run: &Path, kind: &str) -> Vec<Value> {
    events(run).into_iter().filter(|e| e["kind"] == kind).collect()
}

/// Returns the steps of all checkpoints in the log below `prefix`, in the order of writing, including removed ones.
pub fn committed_steps(prefix: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(prefix.join("log")).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "json")).collect();
    paths.sort();
    let texts = paths.iter().filter_map(|p| std::fs::read_to_string(p).ok());
    let entries = texts.filter_map(|t| serde_json::from_str::<Value>(&t).ok());
    entries.filter(|e| e["kind"] == "checkpoint").filter_map(|e| e["step"].as_u64()).collect()
}

/// An update of stage 2.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrainStep {
    /// Number of the update, from 1.
    pub step: u64,
    /// Groups of the batch: pass over the data, record id.
    pub groups: Vec<(u64, String)>,
    /// Whether the update was skipped and left the weights unchanged.
    pub skipped: bool,
    /// Number of groups without any reward, judged by the rewards of their responses, independent of the learner's accounting.
    pub wholly_masked: usize,
}

impl TrainStep {
    #[track_caller]
    fn read(event: &Value) -> Self {
        let incomplete = || -> ! { panic!("incomplete train event: {event}") };
        let ids = |list: &Value| -> Vec<String> {
            let list = list.as_array().unwrap_or_else(|| incomplete());
            list.iter().map(|g| g.as_str().unwrap_or_else(|| incomplete()).to_owned()).collect()
        };
        let groups_of_pass = |pass: &Value, list: &Value| -> Vec<(u64, String)> {
            let pass = pass.as_u64().unwrap_or_else(|| incomplete());
            ids(list).into_iter().map(|g| (pass, g)).collect()
        };
        let groups = match event["passes"].as_array() {
            Some(passes) => passes.iter().flat_map(|p| groups_of_pass(&p[0], &p[1])).collect(),
            None => groups_of_pass(&event["pass"], &event["groups"]),
        };
        let number = |value: &Value| usize::try_from(value.as_u64().unwrap_or(0)).unwrap_or(usize::MAX);
        let unrewarded = number(&event["masked"]["total"]);
        let responses = number(&event["responses"]);
        let group_size = responses.checked_div(groups.len()).unwrap_or(0).max(1);
        Self {
            step: event["step"].as_u64().unwrap_or_else(|| incomplete()),
            skipped: event["skipped"].is_string(),
            wholly_masked: unrewarded.div_ceil(group_size),
            groups,
        }
    }

    /// Returns the number of groups that contributed to the update.
    pub fn trained(&self) -> usize {
        if self.skipped { 0 } else { self.groups.len().saturating_sub(self.wholly_masked) }
    }
}

/// Updates of the final lineage, without updates that were redone after a resume or made by a learner whose term was over.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lineage {
    /// Updates in the order of training.
    pub steps: Vec<TrainStep>,
    /// Steps from which stage 2 was resumed.
    pub resumed: Vec<u64>,
}

impl Lineage {
    /// Reads the lineage from `events.jsonl`.
    #[track_caller]
    pub fn read(run: &Path) -> Self {
        let mut out = Self::default();
        let mut newest_term = 0;
        for e in events(run) {
            let term = e["term"].as_u64().unwrap_or(newest_term);
            if term < newest_term && e["kind"] != "started" {
                continue;
            }
            newest_term = term;
            match (e["kind"].as_str(), e["stage"].as_str()) {
                (Some("started"), Some("rl")) => out.steps.clear(),
                (Some("resumed"), Some("rl")) => {
                    let step = e["step"].as_u64().unwrap_or_else(|| panic!("no step in {e}"));
                    out.steps.retain(|s| s.step <= step);
                    out.resumed.push(step);
                }
                (Some("train"), _) => out.steps.push(TrainStep::read(&e)),
                _ => {}
            }
        }
        out
    }

    /// Asserts that steps 1 to `steps` occur once each, with `per_step` trained groups; that no pass has a group twice; and that each
    /// completed pass has all `records` groups.
    #[track_caller]
    pub fn assert_exactly_once(&self, steps: u64, per_step: usize, records: usize) {
        for s in &self.steps {
            assert_eq!(s.trained(), per_step, "groups that step {} trained: {s:?}", s.step);
        }
        let numbers: Vec<u64> = self.steps.iter().map(|s| s.step).collect();
        assert_eq!(numbers, (1..=steps).collect::<Vec<_>>(), "steps of the final lineage");
        for s in &self.steps {
            assert_eq!(s.groups.len(), per_step, "groups of step {}: {:?}", s.step, s.groups);
        }
        assert_eq!(self.count_duplicated_and_lost(records), (0, 0), "groups duplicated and lost: {:?}", self.steps);
    }

    /// Returns the number of groups trained more than once in a pass, and of groups missing in completed passes over `records` records.
    pub fn count_duplicated_and_lost(&self, records: usize) -> (usize, usize) {
        let mut passes: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
        for (pass, group) in self.steps.iter().flat_map(|s| &s.groups) {
            passes.entry(*pass).or_default().push(group);
        }
        let last = passes.keys().next_back().copied().unwrap_or(0);
        (0..=last).fold((0, 0), |(duplicated, lost), pass| {
            let mut groups = passes.remove(&pass).unwrap_or_default();
            let all = groups.len();
            groups.sort_unstable();
            groups.dedup();
            let missing = if pass == last { 0 } else { records.saturating_sub(groups.len()) };
            (duplicated + all - groups.len(), lost + missing)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untrained_groups_are_counted() {
        let event = |more: &str| -> Value {
            let text = format!(r#"{{"kind":"train","step":3,"pass":0,"groups":["a","b"],"responses":8{more}}}"#);
            serde_json::from_str(&text).unwrap()
        };
        for (more, skipped, masked, trained) in [
            ("", false, 0, 2),
            (r#","masked":{"total":4,"format":4}"#, false, 1, 1),
            (r#","masked":{"format":8}"#, false, 0, 2),
            (r#","masked":{"total":8},"skipped":"every reward of the batch is masked""#, true, 2, 0),
            (r#","skipped":"the loss is not finite""#, true, 0, 0),
        ] {
            let s = TrainStep::read(&event(more));
            assert_eq!((s.skipped, s.wholly_masked, s.trained()), (skipped, masked, trained), "{more}");
        }
    }

    #[test]
    fn duplicated_and_lost_groups_are_counted() {
        let step = |step, groups: &[(u64, &str)]| TrainStep {
            step,
            groups: groups.iter().map(|(pass, id)| (*pass, (*id).to_owned())).collect(),
            ..TrainStep::default()
        };
        let lineage = |steps| Lineage { steps, resumed: vec![] };
        let fine = vec![step(1, &[(0, "a"), (0, "b")]), step(2, &[(0, "c"), (1, "b")])];
        assert_eq!(lineage(fine).count_duplicated_and_lost(3), (0, 0));
        let wrong = vec![step(1, &[(0, "a"), (0, "a")]), step(2, &[(2, "c"), (2, "c")])];
        assert_eq!(lineage(wrong).count_duplicated_and_lost(3), (2, 2 + 3));
    }
}
