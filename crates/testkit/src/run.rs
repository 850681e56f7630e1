//! Files of a run directory, as a test reads them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

/// Reads a JSON file.
#[track_caller]
pub fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Parses JSON lines; blank ones are skipped.
#[track_caller]
pub fn json_lines(text: &str) -> Vec<Value> {
    let parse = |l: &str| serde_json::from_str(l).unwrap_or_else(|e| panic!("not a line of JSON ({e}): {l}"));
    text.lines().filter(|l| !l.trim().is_empty()).map(parse).collect()
}

/// Whole events of a run so far; none when there is no file yet, and a line that is being written is left out.
pub fn events(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("events.jsonl")).unwrap_or_default();
    text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
}

/// Events of one kind.
pub fn events_of(run: &Path, kind: &str) -> Vec<Value> {
    events(run).into_iter().filter(|e| e["kind"] == kind).collect()
}

/// Steps of the checkpoints that the log under `place` names, in the order of writing; removed ones are among them.
pub fn committed(place: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(place.join("log")).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "json")).collect();
    paths.sort();
    let texts = paths.iter().filter_map(|p| std::fs::read_to_string(p).ok());
    let entries = texts.filter_map(|t| serde_json::from_str::<Value>(&t).ok());
    entries.filter(|e| e["kind"] == "checkpoint").filter_map(|e| e["step"].as_u64()).collect()
}

/// One update of stage 2.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrainStep {
    /// Its number, from 1.
    pub step: u64,
    /// Groups of its batch: pass over the data, record id.
    pub groups: Vec<(u64, String)>,
    /// It left the weights as they were.
    pub skipped: bool,
    /// Groups of the batch without any reward, by what their responses got and not by what the learner made of it.
    pub wholly_masked: usize,
}

impl TrainStep {
    #[track_caller]
    fn read(event: &Value) -> Self {
        let bad = || -> ! { panic!("not a whole train event: {event}") };
        let names = |list: &Value| -> Vec<String> {
            let list = list.as_array().unwrap_or_else(|| bad());
            list.iter().map(|g| g.as_str().unwrap_or_else(|| bad()).to_owned()).collect()
        };
        let of = |pass: &Value, list: &Value| -> Vec<(u64, String)> {
            let pass = pass.as_u64().unwrap_or_else(|| bad());
            names(list).into_iter().map(|g| (pass, g)).collect()
        };
        let groups = match event["passes"].as_array() {
            Some(passes) => passes.iter().flat_map(|p| of(&p[0], &p[1])).collect(),
            None => of(&event["pass"], &event["groups"]),
        };
        let number = |value: &Value| usize::try_from(value.as_u64().unwrap_or(0)).unwrap_or(usize::MAX);
        let (unrewarded, responses) = (number(&event["masked"]["total"]), number(&event["responses"]));
        let of_a_group = responses.checked_div(groups.len()).unwrap_or(0).max(1);
        Self {
            step: event["step"].as_u64().unwrap_or_else(|| bad()),
            skipped: event["skipped"].is_string(),
            wholly_masked: unrewarded.div_ceil(of_a_group),
            groups,
        }
    }

    /// Groups that trained something.
    pub fn trained(&self) -> usize {
        if self.skipped { 0 } else { self.groups.len().saturating_sub(self.wholly_masked) }
    }
}

/// Updates of the final lineage: those that were redone after a resumption do not count, nor those of a learner whose term was over.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lineage {
    /// Updates in the order of training.
    pub steps: Vec<TrainStep>,
    /// Steps that stage 2 was resumed from.
    pub resumed: Vec<u64>,
}

impl Lineage {
    /// Reads it from `events.jsonl`.
    #[track_caller]
    pub fn read(run: &Path) -> Self {
        let (mut out, mut newest) = (Self::default(), 0);
        for e in events(run) {
            let term = e["term"].as_u64().unwrap_or(newest);
            if term < newest && e["kind"] != "started" {
                continue;
            }
            newest = term;
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

    /// Requires steps 1 to `steps`, each once, with `per_step` groups that it trained; in no pass a group twice; and in each pass that is
    /// over all `records` groups.
    #[track_caller]
    pub fn is_exactly_once(&self, steps: u64, per_step: usize, records: usize) {
        for s in &self.steps {
            assert_eq!(s.trained(), per_step, "groups that step {} trained: {s:?}", s.step);
        }
        let numbers: Vec<u64> = self.steps.iter().map(|s| s.step).collect();
        assert_eq!(numbers, (1..=steps).collect::<Vec<_>>(), "steps of the final lineage");
        for s in &self.steps {
            assert_eq!(s.groups.len(), per_step, "groups of step {}: {:?}", s.step, s.groups);
        }
        assert_eq!(self.doubled_and_lost(records), (0, 0), "groups doubled and lost: {:?}", self.steps);
    }

    /// Groups that a pass trained more than once, and groups that are missing in passes that are over, of data of so many records.
    pub fn doubled_and_lost(&self, records: usize) -> (usize, usize) {
        let mut passes: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
        for (pass, group) in self.steps.iter().flat_map(|s| &s.groups) {
            passes.entry(*pass).or_default().push(group);
        }
        let last = passes.keys().next_back().copied().unwrap_or(0);
        (0..=last).fold((0, 0), |(doubled, lost), pass| {
            let mut groups = passes.remove(&pass).unwrap_or_default();
            let all = groups.len();
            groups.sort_unstable();
            groups.dedup();
            let missing = if pass == last { 0 } else { records.saturating_sub(groups.len()) };
            (doubled + all - groups.len(), lost + missing)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_trained_nothing_is_seen() {
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
    fn doubled_and_lost_groups_are_counted() {
        let step = |step, groups: &[(u64, &str)]| TrainStep {
            step,
            groups: groups.iter().map(|(pass, id)| (*pass, (*id).to_owned())).collect(),
            ..TrainStep::default()
        };
        let lineage = |steps| Lineage { steps, resumed: vec![] };
        let fine = vec![step(1, &[(0, "a"), (0, "b")]), step(2, &[(0, "c"), (1, "b")])];
        assert_eq!(lineage(fine).doubled_and_lost(3), (0, 0));
        let wrong = vec![step(1, &[(0, "a"), (0, "a")]), step(2, &[(2, "c"), (2, "c")])];
        assert_eq!(lineage(wrong).doubled_and_lost(3), (2, 2 + 3));
    }
}
