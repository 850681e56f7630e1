//! The ledger of group outcomes, counted one by one and independently of the data order that decides which group is next, so that the two
//! can be compared. It is part of every checkpoint.

use serde::{Deserialize, Serialize};
use unveil_core::{GroupId, WeightVersion};

/// Maximum number of dropped groups that are named; further ones are only counted.
const MAX_NAMED_GROUPS: usize = 1000;

/// Outcome of a group in an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupOutcome {
    /// The group was part of the update.
    Trained,
    /// The update of the batch was skipped.
    Skipped,
    /// No response of the group had a reward, so there was nothing to learn from.
    Masked,
    /// All responses of the group were cut at the length limit and left out of the loss.
    Filtered,
    /// The group was looked at and replaced by a further one, because its responses teach nothing.
    Replaced,
}

/// Outcomes of groups by pass in the lineage of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// Passes that have started, in order.
    passes: Vec<PassLedger>,
    /// The first groups that were set aside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    set_aside: Vec<DroppedGroup>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct PassLedger {
    pass: u64,
    /// Trained groups; a group that is trained twice counts twice.
    trained: u64,
    /// Number of distinct records among all finished groups, regardless of outcome.
    different: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    skipped: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    wholly_masked: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    dropped: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    filtered: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    replaced: u64,
    /// One bit per record of the data set; empty once all are set.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "hex")]
    rows: Vec<u8>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A group that was set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DroppedGroup {
    /// Pass of the group.
    pub pass: u64,
    /// Id of its record.
    pub record: String,
    /// Why it was set aside.
    pub why: String,
}

impl PassLedger {
    /// Returns the number of finished groups.
    fn done(&self) -> u64 {
        self.trained + self.skipped + self.wholly_masked + self.dropped + self.filtered + self.replaced
    }
}

impl Ledger {
    /// Counts the outcome of a group, which is row `row` of `records` in pass `pass`.
    pub(crate) fn record(&mut self, pass: u64, row: usize, records: u64, outcome: GroupOutcome) {
        let p = self.mark_done(pass, row, records);
        match outcome {
            GroupOutcome::Trained => p.trained += 1,
            GroupOutcome::Skipped => p.skipped += 1,
            GroupOutcome::Masked => p.wholly_masked += 1,
            GroupOutcome::Filtered => p.filtered += 1,
            GroupOutcome::Replaced => p.replaced += 1,
        }
    }

    /// Counts a group that was set aside.
    pub(crate) fn drop_group(&mut self, group: &GroupId, row: usize, records: u64, why: String) {
        self.mark_done(group.pass, row, records).dropped += 1;
        if self.set_aside.len() < MAX_NAMED_GROUPS {
            self.set_aside.push(DroppedGroup { pass: group.pass, record: group.record.clone(), why });
        }
    }

    /// Returns the first 1000 groups that were set aside.
    pub fn set_aside(&self) -> &[DroppedGroup] {
        &self.set_aside
    }

    /// Returns the number of groups that were set aside.
    pub(crate) fn dropped(&self) -> u64 {
        self.passes.iter().map(|p| p.dropped).sum()
    }

    /// Returns the number of groups that were looked at and replaced.
    pub(crate) fn replaced(&self) -> u64 {
        self.passes.iter().map(|p| p.replaced).sum()
    }

    /// Returns the numbers of groups by outcome over all passes.
    pub(crate) fn sums(&self) -> PassAccount {
        let mut sums = PassAccount::default();
        for p in &self.passes {
            sums.trained += p.trained;
            sums.skipped += p.skipped;
            sums.wholly_masked += p.wholly_masked;
            sums.dropped += p.dropped;
            sums.filtered += p.filtered;
            sums.replaced += p.replaced;
        }
        sums
    }

    /// Marks a row as done and returns the ledger of its pass.
    fn mark_done(&mut self, pass: u64, row: usize, records: u64) -> &mut PassLedger {
        let index = self.passes.partition_point(|p| p.pass < pass);
        if self.passes.get(index).is_none_or(|p| p.pass != pass) {
            let rows = vec![0; usize::try_from(records.div_ceil(8)).unwrap_or(0)];
            self.passes.insert(index, PassLedger { pass, rows, ..PassLedger::default() });
        }
        let p = &mut self.passes[index];
        if let Some(byte) = p.rows.get_mut(row / 8).filter(|byte| **byte & (1 << (row % 8)) == 0) {
            *byte |= 1 << (row % 8);
            p.different += 1;
        }
        if p.different == records {
            p.rows = Vec::new();
        }
        p
    }
}

/// Accounting of one pass.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PassAccount {
    /// The pass, from 0.
    pub pass: u64,
    /// Trained groups.
    pub trained: u64,
    /// Groups that occurred more than once in this pass.
    pub twice: u64,
    /// Groups that should be finished but are not.
    pub lost: u64,
    /// Groups that were set aside and never trained.
    #[serde(skip_serializing_if = "is_zero")]
    pub dropped: u64,
    /// Groups whose update was skipped.
    #[serde(skip_serializing_if = "is_zero")]
    pub skipped: u64,
    /// Groups without any reward.
    #[serde(skip_serializing_if = "is_zero")]
    pub wholly_masked: u64,
    /// Groups whose responses were all left out of the loss by the overlong filter.
    #[serde(skip_serializing_if = "is_zero")]
    pub filtered: u64,
    /// Groups that were looked at and replaced by a further one, because their responses teach nothing.
    #[serde(skip_serializing_if = "is_zero")]
    pub replaced: u64,
}

/// Comparison of a checkpoint's ledger with its position in the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Accounting {
    /// Groups per pass, i.e. records in the data set.
    pub records: u64,
    /// Groups trained, over all passes.
    pub trained: u64,
    /// Groups that occurred more than once in a pass, over all passes.
    pub twice: u64,
    /// Groups that were left out, over all passes.
    pub lost: u64,
    /// Groups that were set aside and never trained, not counting stale groups that were leased again.
    pub dropped: u64,
    /// Groups whose update was skipped.
    pub skipped: u64,
    /// Groups without any reward.
    pub wholly_masked: u64,
    /// Groups whose responses were all left out of the loss by the overlong filter.
    pub filtered: u64,
    /// Groups that were looked at and replaced by a further one, because their responses teach nothing.
    pub replaced: u64,
    /// Whether every due group was trained exactly once, or looked at exactly once and left out as configured (filtered or replaced);
    /// none was lost, dropped, skipped or wholly masked.
    pub exactly_once: bool,
    /// Accounting by pass; the last pass may be incomplete.
    pub passes: Vec<PassAccount>,
    /// The first 1000 groups that were set aside.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set_aside: Vec<DroppedGroup>,
}

/// Position of a run in its data, as stored in checkpoints. Groups in flight return to the queue on restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExperienceSnapshot {
    /// Number of finished groups over all passes, which determines the position. Their outcomes are in the ledger.
    pub trained: u64,
    /// Pass of the next group.
    pub pass: u64,
    /// Position of the next group in that pass.
    pub position: u64,
    /// Published weight version.
    pub version: WeightVersion,
    /// Seed of the data order.
    pub seed: u64,
    /// Number of records in the data set.
    pub records: u64,
    /// BLAKE3 over the record ids in order, hex.
    pub data: String,
    /// Groups leased, ready or in training at the time of the snapshot (informational; not used by restore).
    pub in_flight: Vec<GroupId>,
    /// Outcomes of groups, counted independently of the position.
    pub ledger: Ledger,
    /// Groups set aside that the position has not passed, with the reasons.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aside: Vec<(GroupId, String)>,
}

impl ExperienceSnapshot {
    /// Returns the accounting of the lineage of this snapshot.
    pub fn accounting(&self) -> Accounting {
        let due = |pass: u64| match pass.cmp(&self.pass) {
            std::cmp::Ordering::Less => self.records,
            std::cmp::Ordering::Equal => self.position,
            std::cmp::Ordering::Greater => 0,
        };
        let ledger_of = |pass: u64| self.ledger.passes.iter().find(|p| p.pass == pass);
        let last = self.ledger.passes.last().map_or(0, |p| p.pass).max(self.pass);
        let account = |pass: u64| {
            let Some(p) = ledger_of(pass) else {
                return PassAccount { pass, lost: due(pass), ..PassAccount::default() };
            };
            PassAccount {
                pass,
                trained: p.trained,
                twice: p.done().saturating_sub(p.different.min(due(pass))),
                lost: due(pass).saturating_sub(p.different),
                dropped: p.dropped,
                skipped: p.skipped,
                wholly_masked: p.wholly_masked,
                filtered: p.filtered,
                replaced: p.replaced,
            }
        };
        let is_relevant = |p: &PassAccount| p.lost > 0 || ledger_of(p.pass).is_some_and(|p| p.done() > 0);
        let passes: Vec<PassAccount> = (0..=last).map(account).filter(is_relevant).collect();
        let sum = |count: fn(&PassAccount) -> u64| passes.iter().map(count).sum();
        let trained = sum(|p| p.trained);
        let twice = sum(|p| p.twice);
        let lost = sum(|p| p.lost);
        let dropped = sum(|p| p.dropped);
        let skipped = sum(|p| p.skipped);
        let wholly_masked = sum(|p| p.wholly_masked);
        let filtered = sum(|p| p.filtered);
        let replaced = sum(|p| p.replaced);
        // If all groups before the position were trained or left out, no group can have had another outcome.
        let exactly_once = twice == 0 && lost == 0 && trained + filtered + replaced == self.trained;
        let set_aside = self.ledger.set_aside.clone();
        Accounting {
            records: self.records,
            trained,
            twice,
            lost,
            dropped,
            skipped,
            wholly_masked,
            filtered,
            replaced,
            exactly_once,
            passes,
            set_aside,
        }
    }
}

/// Serialization of bytes as hexadecimal text.
mod hex {
    use std::fmt::Write;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            let _ = write!(text, "{byte:02x}");
        }
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let pair = |p: &[u8]| {
            std::str::from_utf8(p).ok().filter(|p| p.len() == 2).and_then(|p| u8::from_str_radix(p, 16).ok())
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes.ok_or_else(|| D::Error::custom("not hexadecimal bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(trained: u64, ledger: Ledger) -> ExperienceSnapshot {
        ExperienceSnapshot {
            trained,
            pass: trained / 11,
            position: trained % 11,
            version: 0,
            seed: 0,
            records: 11,
            data: String::new(),
            in_flight: vec![],
            ledger,
            aside: vec![],
        }
    }

    fn ledger(groups: impl IntoIterator<Item = (u64, usize)>) -> Ledger {
        let mut l = Ledger::default();
        groups.into_iter().for_each(|(pass, row)| l.record(pass, row, 11, GroupOutcome::Trained));
        serde_json::from_str(&serde_json::to_string(&l).unwrap()).unwrap()
    }

    fn pass(pass: u64, trained: u64, twice: u64, lost: u64) -> PassAccount {
        PassAccount { pass, trained, twice, lost, ..PassAccount::default() }
    }

    #[test]
    fn complete_and_started_passes() {
        let rows = (0..11).map(|r| (0, r * 7 % 11));
        let a = snapshot(14, ledger(rows.chain([(1, 3), (1, 10), (1, 0)]))).accounting();
        assert!(a.exactly_once);
        assert_eq!((a.records, a.trained, a.passes), (11, 14, vec![pass(0, 11, 0, 0), pass(1, 3, 0, 0)]));
        assert_eq!(snapshot(0, Ledger::default()).accounting().passes, []);
        assert!(snapshot(0, Ledger::default()).accounting().exactly_once);
    }

    #[test]
    fn groups_trained_twice_or_never_are_counted() {
        // The position is 14, but row 3 of the first pass occurs twice and row 4 never.
        let rows = [0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 10].map(|r| (0, r));
        let a = snapshot(14, ledger(rows.into_iter().chain([(1, 3), (1, 4), (1, 5)]))).accounting();
        assert_eq!((a.exactly_once, a.twice, a.lost), (false, 1, 1));
        assert_eq!(a.passes, [pass(0, 11, 1, 1), pass(1, 3, 0, 0)]);
        // A complete pass drops its row bits but keeps the excess count.
        let a = snapshot(11, ledger((0..11).chain([6]).map(|r| (0, r)))).accounting();
        assert_eq!((a.exactly_once, a.passes), (false, vec![pass(0, 12, 1, 0)]));
        // A pass that was left out completely, and one that is not due yet.
        let a = snapshot(22, ledger((0..11).map(|r| (0, r)).chain([(2, 1)]))).accounting();
        assert_eq!(a.passes, [pass(0, 11, 0, 0), pass(1, 0, 0, 11), pass(2, 1, 1, 0)]);
        assert!(!a.exactly_once);
    }

    #[test]
    fn untrained_groups_are_counted_by_outcome() {
        let id = |row: usize| GroupId { pass: 0, position: 0, record: format!("r{row}") };
        for (outcome, counts) in
            [(Some(GroupOutcome::Skipped), [1, 0, 0]), (Some(GroupOutcome::Masked), [0, 1, 0]), (None, [0, 0, 1])]
        {
            let mut l = ledger((0..10).map(|r| (0, r)));
            match outcome {
                Some(outcome) => l.record(0, 10, 11, outcome),
                None => l.drop_group(&id(10), 10, 11, "it killed three workers".into()),
            }
            let l: Ledger = serde_json::from_str(&serde_json::to_string(&l).unwrap()).unwrap();
            let a = snapshot(11, l).accounting();
            assert_eq!((a.trained, a.twice, a.lost, a.exactly_once), (10, 0, 0, false), "{outcome:?}");
            assert_eq!([a.skipped, a.wholly_masked, a.dropped], counts, "{outcome:?}");
            let p = &a.passes[0];
            assert_eq!([p.skipped, p.wholly_masked, p.dropped], counts, "{outcome:?}");
            let named: Vec<&str> = a.set_aside.iter().map(|d| d.record.as_str()).collect();
            assert_eq!(named, if outcome.is_none() { vec!["r10"] } else { vec![] });
        }
        // A ledger in the format without these counts.
        let old: Ledger = serde_json::from_str(r#"{"passes":[{"pass":0,"trained":11,"different":11}]}"#).unwrap();
        assert!(snapshot(11, old).accounting().exactly_once);
    }

    #[test]
    fn replaced_and_filtered_groups_keep_the_accounting_exact() {
        for outcome in [GroupOutcome::Replaced, GroupOutcome::Filtered] {
            let mut l = ledger((0..10).map(|r| (0, r)));
            l.record(0, 10, 11, outcome);
            let l: Ledger = serde_json::from_str(&serde_json::to_string(&l).unwrap()).unwrap();
            let a = snapshot(11, l.clone()).accounting();
            let counts = (a.trained, a.replaced + a.filtered, a.twice, a.lost, a.exactly_once);
            assert_eq!(counts, (10, 1, 0, 0, true), "{outcome:?}");
            assert_eq!(a.replaced, u64::from(outcome == GroupOutcome::Replaced));
            assert_eq!((a.passes[0].replaced, a.passes[0].filtered), (a.replaced, a.filtered));
            // It occurs a second time.
            let mut twice = l;
            twice.record(0, 10, 11, GroupOutcome::Trained);
            let a = snapshot(11, twice).accounting();
            assert_eq!((a.twice, a.exactly_once), (1, false), "{outcome:?}");
        }
    }

    #[test]
    fn invalid_hexadecimal_text_is_refused() {
        for bad in ["0", "zz", "é1"] {
            let text = format!(r#"{{"passes":[{{"pass":0,"trained":1,"different":1,"rows":"{bad}"}}]}}"#);
            assert!(serde_json::from_str::<Ledger>(&text).unwrap_err().to_string().contains("hexadecimal"), "{bad}");
        }
    }
}
