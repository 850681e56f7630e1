//! Leaks between splits: the same image or patient in more than one of them, and the rule that decides which copy is kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use unveil_core::Record;

use super::images::ImageInfo;
use super::report::Leak;
use super::split::leak_priority;

/// A finished record with the image and patient by which its copies are recognised.
pub(super) struct BuiltRecord<T> {
    pub(super) record: Record,
    pub(super) patient: String,
    pub(super) image: ImageInfo,
    /// Where the record comes from, for later stages.
    pub(super) origin: T,
}

/// Returns each record whose image is also in a split of higher priority, together with one record of that split.
///
/// The copy in test is kept, else the one in val, else the one in train. Several records of one image in one split are not a leak.
pub(super) fn find_leaks<T>(records: &[BuiltRecord<T>]) -> Vec<Leak> {
    let mut best: HashMap<ImageInfo, &Record> = HashMap::new();
    for built in records {
        let kept = best.entry(built.image).or_insert(&built.record);
        if leak_priority(&built.record.split) < leak_priority(&kept.split) {
            *kept = &built.record;
        }
    }
    let leak = |built: &BuiltRecord<T>| {
        let kept = best.get(&built.image).filter(|kept| kept.split != built.record.split)?;
        Some(Leak {
            id: kept.id.clone(),
            split: kept.split.clone(),
            copy: built.record.id.clone(),
            copy_split: built.record.split.clone(),
        })
    };
    records.iter().filter_map(leak).collect()
}

/// Returns the patients with records in more than one split.
pub(super) fn find_split_patients<T>(records: &[BuiltRecord<T>]) -> Vec<String> {
    let mut splits: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for built in records.iter().filter(|built| !built.patient.is_empty()) {
        splits.entry(&built.patient).or_default().insert(&built.record.split);
    }
    splits.into_iter().filter(|(_, s)| s.len() > 1).map(|(p, _)| p.to_owned()).collect()
}
