//! The same image or patient in more than one split. Owns the rule which copy stays. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use unveil_core::Record;

use super::images::Seen;
use super::report::Leak;
use super::split::rank;

/// A record with what tells its copies.
pub(super) struct Judged<T> {
    pub(super) record: Record,
    pub(super) patient: String,
    pub(super) seen: Seen,
    /// What else is kept with it.
    pub(super) origin: T,
}

/// Copies of an image across splits: each record whose image a better ranked split holds too, with one record of that split.
///
/// The copy in test stays, then that in val, then that in train. Several records of one image in one split are no leak.
pub(super) fn leaks<T>(all: &[Judged<T>]) -> Vec<Leak> {
    let mut best: HashMap<Seen, &Record> = HashMap::new();
    for j in all {
        let kept = best.entry(j.seen).or_insert(&j.record);
        if rank(&j.record.split) < rank(&kept.split) {
            *kept = &j.record;
        }
    }
    let leak = |j: &Judged<T>| {
        let kept = best.get(&j.seen).filter(|kept| kept.split != j.record.split)?;
        Some(Leak {
            id: kept.id.clone(),
            split: kept.split.clone(),
            copy: j.record.id.clone(),
            copy_split: j.record.split.clone(),
        })
    };
    all.iter().filter_map(leak).collect()
}

/// Patients with records in more than one split.
pub(super) fn split_patients<T>(all: &[Judged<T>]) -> Vec<String> {
    let mut splits: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for j in all.iter().filter(|j| !j.patient.is_empty()) {
        splits.entry(&j.patient).or_default().insert(&j.record.split);
    }
    splits.into_iter().filter(|(_, s)| s.len() > 1).map(|(p, _)| p.to_owned()).collect()
}
