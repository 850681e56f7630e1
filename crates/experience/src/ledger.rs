//! The ledger: which groups were trained, counted one by one and apart from the order that decides what is next, so that one
//! can be held against the other. Goes into every checkpoint. Must not know: leases, workers, time.

use serde::{Deserialize, Serialize};

use crate::settings::Snapshot;

/// Trained groups by pass, over the lineage of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// Passes that have begun, in order.
    passes: Vec<Pass>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Pass {
    pass: u64,
    /// Groups that updates have trained; one that is trained twice counts twice.
    trained: u64,
    /// Different records among them.
    different: u64,
    /// One bit per record of the data set; empty once all are set.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "hex")]
    rows: Vec<u8>,
}

impl Ledger {
    /// Counts a group as trained: row `row` of `records` in pass `pass`.
    pub(crate) fn note(&mut self, pass: u64, row: usize, records: u64) {
        let at = self.passes.partition_point(|p| p.pass < pass);
        if self.passes.get(at).is_none_or(|p| p.pass != pass) {
            let rows = vec![0; usize::try_from(records.div_ceil(8)).unwrap_or(0)];
            self.passes.insert(at, Pass { pass, trained: 0, different: 0, rows });
        }
        let p = &mut self.passes[at];
        p.trained += 1;
        if let Some(byte) = p.rows.get_mut(row / 8).filter(|byte| **byte & (1 << (row % 8)) == 0) {
            *byte |= 1 << (row % 8);
            p.different += 1;
        }
        if p.different == records {
            p.rows = Vec::new();
        }
    }
}

/// Groups of one pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PassAccount {
    /// The pass, from 0.
    pub pass: u64,
    /// Groups that updates have trained.
    pub trained: u64,
    /// Those among them that were trained before in this pass.
    pub twice: u64,
    /// Groups that should be trained by now and are not.
    pub lost: u64,
}

/// What a checkpoint's ledger says, held against its position in the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Accounting {
    /// Groups of a pass: the records of the data set.
    pub records: u64,
    /// Groups trained, over all passes.
    pub trained: u64,
    /// Groups trained more than once in a pass, over all passes.
    pub twice: u64,
    /// Groups left out, over all passes.
    pub lost: u64,
    /// Nothing was trained twice and nothing was lost.
    pub exactly_once: bool,
    /// Pass by pass; the last one may be under way.
    pub passes: Vec<PassAccount>,
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
        let passes: Vec<PassAccount> = (0..=last)
            .map(|pass| {
                let (trained, different) = of(pass).map_or((0, 0), |p| (p.trained, p.different));
                PassAccount {
                    pass,
                    trained,
                    twice: trained.saturating_sub(different.min(due(pass))),
                    lost: due(pass).saturating_sub(different),
                }
            })
            .filter(|p| (p.trained, p.lost) != (0, 0))
            .collect();
        let sum = |of: fn(&PassAccount) -> u64| passes.iter().map(of).sum();
        let (trained, twice, lost) = (sum(|p| p.trained), sum(|p| p.twice), sum(|p| p.lost));
        let exactly_once = twice == 0 && lost == 0 && trained == self.trained;
        Accounting { records: self.records, trained, twice, lost, exactly_once, passes }
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
        let data = String::new();
        Snapshot { trained, pass, position, version: 0, seed: 0, records: 11, data, in_flight: vec![], ledger }
    }

    fn ledger(groups: impl IntoIterator<Item = (u64, usize)>) -> Ledger {
        let mut l = Ledger::default();
        groups.into_iter().for_each(|(pass, row)| l.note(pass, row, 11));
        serde_json::from_str(&serde_json::to_string(&l).unwrap()).unwrap()
    }

    fn pass(pass: u64, trained: u64, twice: u64, lost: u64) -> PassAccount {
        PassAccount { pass, trained, twice, lost }
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
    fn a_text_that_is_not_hexadecimal_is_refused() {
        for bad in ["0", "zz", "é1"] {
            let text = format!(r#"{{"passes":[{{"pass":0,"trained":1,"different":1,"rows":"{bad}"}}]}}"#);
            assert!(serde_json::from_str::<Ledger>(&text).unwrap_err().to_string().contains("hexadecimal"), "{bad}");
        }
    }
}
