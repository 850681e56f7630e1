//! The ledger: what became of every group, counted one by one and apart from the order that decides what is next, so that one
//! can be held against the other. Goes into every checkpoint. Must not know: leases, workers, time.

use serde::{Deserialize, Serialize};
use unveil_core::GroupId;

use crate::settings::Snapshot;

/// Dropped groups that are named; beyond so many they are only counted.
const NAMED: usize = 1000;

/// What an update made of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It entered the update.
    Trained,
    /// The update of its batch was skipped.
    Skipped,
    /// Every response of it was without a reward: there was nothing to learn from it.
    Masked,
}

/// What became of groups by pass, over the lineage of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// Passes that have begun, in order.
    passes: Vec<Pass>,
    /// Groups that were set aside, the first of them by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    set_aside: Vec<Dropped>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Pass {
    pass: u64,
    /// Groups that updates have trained; one that is trained twice counts twice.
    trained: u64,
    /// Different records among all groups that are done, whatever became of them.
    different: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    skipped: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    wholly_masked: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    dropped: u64,
    /// One bit per record of the data set; empty once all are set.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "hex")]
    rows: Vec<u8>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A group that was set aside, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The pass.
    pub pass: u64,
    /// The record.
    pub record: String,
    /// What happened to it.
    pub why: String,
}

impl Pass {
    /// Groups that are done.
    fn done(&self) -> u64 {
        self.trained + self.skipped + self.wholly_masked + self.dropped
    }
}

impl Ledger {
    /// Counts a group that is done: row `row` of `records` in pass `pass`.
    pub(crate) fn note(&mut self, pass: u64, row: usize, records: u64, fate: Fate) {
        let p = self.reach(pass, row, records);
        match fate {
            Fate::Trained => p.trained += 1,
            Fate::Skipped => p.skipped += 1,
            Fate::Masked => p.wholly_masked += 1,
        }
    }

    /// Counts a group that was set aside.
    pub(crate) fn drop_group(&mut self, group: &GroupId, row: usize, records: u64, why: String) {
        self.reach(group.pass, row, records).dropped += 1;
        if self.set_aside.len() < NAMED {
            self.set_aside.push(Dropped { pass: group.pass, record: group.record.clone(), why });
        }
    }

    /// The groups that were set aside, the first 1000 of them.
    pub fn set_aside(&self) -> &[Dropped] {
        &self.set_aside
    }

    /// Groups that were set aside.
    pub(crate) fn dropped(&self) -> u64 {
        self.passes.iter().map(|p| p.dropped).sum()
    }

    /// Groups that are done by what became of them: trained, skipped, wholly masked, dropped.
    pub(crate) fn sums(&self) -> [u64; 4] {
        let add = |[a, b, c, d]: [u64; 4], p: &Pass| [a + p.trained, b + p.skipped, c + p.wholly_masked, d + p.dropped];
        self.passes.iter().fold([0; 4], add)
    }

    /// The account of a pass, with its row marked as done.
    fn reach(&mut self, pass: u64, row: usize, records: u64) -> &mut Pass {
        let at = self.passes.partition_point(|p| p.pass < pass);
        if self.passes.get(at).is_none_or(|p| p.pass != pass) {
            let rows = vec![0; usize::try_from(records.div_ceil(8)).unwrap_or(0)];
            self.passes.insert(at, Pass { pass, rows, ..Pass::default() });
        }
        let p = &mut self.passes[at];
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

/// Groups of one pass.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PassAccount {
    /// The pass, from 0.
    pub pass: u64,
    /// Groups that updates have trained.
    pub trained: u64,
    /// Groups that came a second time in this pass.
    pub twice: u64,
    /// Groups that should be done by now and are not.
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
}

/// What a checkpoint's ledger says, held against its position in the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Accounting {
    /// Groups of a pass: the records of the data set.
    pub records: u64,
    /// Groups trained, over all passes.
    pub trained: u64,
    /// Groups that came more than once in a pass, over all passes.
    pub twice: u64,
    /// Groups left out, over all passes.
    pub lost: u64,
    /// Groups that were set aside and never trained; those that grew stale and were leased again do not count.
    pub dropped: u64,
    /// Groups whose update was skipped.
    pub skipped: u64,
    /// Groups without any reward, which trained nothing.
    pub wholly_masked: u64,
    /// Every group that is due was trained, and once: none was lost, dropped, skipped or wholly masked.
    pub exactly_once: bool,
    /// Pass by pass; the last one may be under way.
    pub passes: Vec<PassAccount>,
    /// The groups that were set aside, the first 1000 of them, with why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set_aside: Vec<Dropped>,
}

impl Snapshot {
    /// The accounting of the lineage that led here.
    pub fn accounting(&self) -> Accounting {
        let due = |pass: u64| match pass.cmp(&self.pass) {
            std::cmp::Ordering::Less => self.records,
            std::cmp::Ordering::Equal => self.position,
            std::cmp::Ordering::Greater => 0,
        };
        let of = |pass: u64| self.ledger.passes.iter().find(|p| p.pass == pass);
        let last = self.ledger.passes.last().map_or(0, |p| p.pass).max(self.pass);
        let account = |pass: u64| {
            let Some(p) = of(pass) else { return PassAccount { pass, lost: due(pass), ..PassAccount::default() } };
            PassAccount {
                pass,
                trained: p.trained,
                twice: p.done().saturating_sub(p.different.min(due(pass))),
                lost: due(pass).saturating_sub(p.different),
                dropped: p.dropped,
                skipped: p.skipped,
                wholly_masked: p.wholly_masked,
            }
        };
        let is_told = |p: &PassAccount| p.lost > 0 || of(p.pass).is_some_and(|p| p.done() > 0);
        let passes: Vec<PassAccount> = (0..=last).map(account).filter(is_told).collect();
        let sum = |of: fn(&PassAccount) -> u64| passes.iter().map(of).sum();
        let (trained, twice, lost) = (sum(|p| p.trained), sum(|p| p.twice), sum(|p| p.lost));
        let (dropped, skipped) = (sum(|p| p.dropped), sum(|p| p.skipped));
        let wholly_masked = sum(|p| p.wholly_masked);
        // Where all that is behind the position was trained, nothing else can have become of any group.
        let exactly_once = twice == 0 && lost == 0 && trained == self.trained;
        let set_aside = self.ledger.set_aside.clone();
        Accounting {
            records: self.records,
            trained,
            twice,
            lost,
            dropped,
            skipped,
            wholly_masked,
            exactly_once,
            passes,
            set_aside,
        }
    }
}

/// Bytes as a hexadecimal text.
mod hex {
    use std::fmt::Write;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            let _ = write!(text, "{byte:02x}");
        }
        to.serialize_str(&text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let pair = |p: &[u8]| {
            std::str::from_utf8(p).ok().filter(|p| p.len() == 2).and_then(|p| u8::from_str_radix(p, 16).ok())
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(pair).collect();
        bytes.ok_or_else(|| D::Error::custom("not a text of hexadecimal bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(trained: u64, ledger: Ledger) -> Snapshot {
        let (pass, position) = (trained / 11, trained % 11);
        let (data, in_flight, aside) = (String::new(), vec![], vec![]);
        Snapshot { trained, pass, position, version: 0, seed: 0, records: 11, data, in_flight, ledger, aside }
    }

    fn ledger(groups: impl IntoIterator<Item = (u64, usize)>) -> Ledger {
        let mut l = Ledger::default();
        groups.into_iter().for_each(|(pass, row)| l.note(pass, row, 11, Fate::Trained));
        serde_json::from_str(&serde_json::to_string(&l).unwrap()).unwrap()
    }

    fn pass(pass: u64, trained: u64, twice: u64, lost: u64) -> PassAccount {
        PassAccount { pass, trained, twice, lost, ..PassAccount::default() }
    }

    #[test]
    fn whole_passes_and_one_under_way() {
        let rows = (0..11).map(|r| (0, r * 7 % 11));
        let a = snapshot(14, ledger(rows.chain([(1, 3), (1, 10), (1, 0)]))).accounting();
        assert!(a.exactly_once);
        assert_eq!((a.records, a.trained, a.passes), (11, 14, vec![pass(0, 11, 0, 0), pass(1, 3, 0, 0)]));
        assert_eq!(snapshot(0, Ledger::default()).accounting().passes, []);
        assert!(snapshot(0, Ledger::default()).accounting().exactly_once);
    }

    #[test]
    fn what_is_trained_twice_or_never_is_counted() {
        // The position says 14, but row 3 of the first pass came twice and row 4 never.
        let rows = [0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 10].map(|r| (0, r));
        let a = snapshot(14, ledger(rows.into_iter().chain([(1, 3), (1, 4), (1, 5)]))).accounting();
        assert_eq!((a.exactly_once, a.twice, a.lost), (false, 1, 1));
        assert_eq!(a.passes, [pass(0, 11, 1, 1), pass(1, 3, 0, 0)]);
        // A whole pass forgets its rows, but not that there were too many.
        let a = snapshot(11, ledger((0..11).chain([6]).map(|r| (0, r)))).accounting();
        assert_eq!((a.exactly_once, a.passes), (false, vec![pass(0, 12, 1, 0)]));
        // A pass that was left out altogether, and one that is not due yet.
        let a = snapshot(22, ledger((0..11).map(|r| (0, r)).chain([(2, 1)]))).accounting();
        assert_eq!(a.passes, [pass(0, 11, 0, 0), pass(1, 0, 0, 11), pass(2, 1, 1, 0)]);
        assert!(!a.exactly_once);
    }

    #[test]
    fn what_trained_nothing_is_counted_apart_and_is_not_exactly_once() {
        let id = |row: usize| GroupId { pass: 0, position: 0, record: format!("r{row}") };
        for (fate, counts) in [(Some(Fate::Skipped), [1, 0, 0]), (Some(Fate::Masked), [0, 1, 0]), (None, [0, 0, 1])] {
            let mut l = ledger((0..10).map(|r| (0, r)));
            match fate {
                Some(fate) => l.note(0, 10, 11, fate),
                None => l.drop_group(&id(10), 10, 11, "it killed three workers".into()),
            }
            let l: Ledger = serde_json::from_str(&serde_json::to_string(&l).unwrap()).unwrap();
            let a = snapshot(11, l).accounting();
            assert_eq!((a.trained, a.twice, a.lost, a.exactly_once), (10, 0, 0, false), "{fate:?}");
            assert_eq!([a.skipped, a.wholly_masked, a.dropped], counts, "{fate:?}");
            let p = &a.passes[0];
            assert_eq!([p.skipped, p.wholly_masked, p.dropped], counts, "{fate:?}");
            let named: Vec<&str> = a.set_aside.iter().map(|d| d.record.as_str()).collect();
            assert_eq!(named, if fate.is_none() { vec!["r10"] } else { vec![] });
        }
        // A ledger as it was written before these were counted.
        let old: Ledger = serde_json::from_str(r#"{"passes":[{"pass":0,"trained":11,"different":11}]}"#).unwrap();
        assert!(snapshot(11, old).accounting().exactly_once);
    }

    #[test]
    fn a_text_that_is_not_hexadecimal_is_refused() {
        for bad in ["0", "zz", "é1"] {
            let text = format!(r#"{{"passes":[{{"pass":0,"trained":1,"different":1,"rows":"{bad}"}}]}}"#);
            assert!(serde_json::from_str::<Ledger>(&text).unwrap_err().to_string().contains("hexadecimal"), "{bad}");
        }
    }
}
