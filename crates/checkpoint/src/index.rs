//! What the log says about checkpoints: which exist, which lineage a resumed run is in, which is the best. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::log::{Entry, Kind};

/// One checkpoint as the log knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Its log entry.
    pub seq: u64,
    /// Term of its writer.
    pub term: u64,
    /// Step after which it was taken.
    pub step: u64,
    /// Its folder under the run's prefix.
    pub path: String,
    /// BLAKE3 of its manifest, hex.
    pub manifest_blake3: String,
    /// Bytes of all objects.
    pub bytes: u64,
    /// Number of objects.
    pub objects: usize,
    /// Whether it is the best of the current lineage.
    pub best: bool,
    /// Whether it is in the lineage that `auto` resumes (a run resumed from an earlier step leaves later ones aside).
    pub current: bool,
    /// Clock of the writer.
    pub created_unix_s: u64,
}

/// The checkpoints that exist, oldest first, and the head of the current lineage.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) live: Vec<CheckpointInfo>,
    /// Live checkpoints of the current lineage, newest first.
    pub(crate) lineage: Vec<u64>,
    /// Whether the current lineage ever had a checkpoint.
    pub(crate) begun: bool,
}

impl Index {
    pub(crate) fn new(entries: &[Entry]) -> Self {
        let mut all: BTreeMap<u64, CheckpointInfo> = BTreeMap::new();
        let mut parents: BTreeMap<u64, Option<u64>> = BTreeMap::new();
        let mut flagged = Vec::new();
        let mut head = None;
        for e in entries {
            match &e.kind {
                Kind::Checkpoint { step, path, manifest_blake3, bytes, objects } => {
                    parents.insert(e.seq, head);
                    head = Some(e.seq);
                    all.insert(
                        e.seq,
                        CheckpointInfo {
                            seq: e.seq,
                            term: e.term,
                            step: *step,
                            path: path.clone(),
                            manifest_blake3: manifest_blake3.clone(),
                            bytes: *bytes,
                            objects: *objects,
                            best: false,
                            current: false,
                            created_unix_s: e.written_unix_s,
                        },
                    );
                }
                Kind::Resumed { from } => head = *from,
                Kind::Best { of } => flagged.push(*of),
                Kind::Removed { of } => all.retain(|seq, _| !of.contains(seq)),
                Kind::Claim { .. } | Kind::Unknown => {}
            }
        }
        let (mut lineage, mut seen, mut at) = (Vec::new(), BTreeSet::new(), head);
        while let Some(seq) = at.filter(|s| seen.insert(*s)) {
            if let Some(c) = all.get_mut(&seq) {
                c.current = true;
                lineage.push(seq);
            }
            at = parents.get(&seq).copied().flatten();
        }
        if let Some(c) = flagged.iter().rev().find(|s| lineage.contains(s)).and_then(|s| all.get_mut(s)) {
            c.best = true;
        }
        Self { live: all.into_values().collect(), lineage, begun: head.is_some() }
    }

    pub(crate) fn get(&self, seq: u64) -> Option<&CheckpointInfo> {
        self.live.iter().find(|c| c.seq == seq)
    }

    /// The newest of a step, of the current lineage if there is one.
    pub(crate) fn of_step(&self, step: u64) -> Option<&CheckpointInfo> {
        self.live.iter().filter(|c| c.step == step).max_by_key(|c| (c.current, c.seq))
    }

    /// The newest of the current lineage.
    pub(crate) fn newest(&self) -> Option<&CheckpointInfo> {
        self.lineage.first().and_then(|seq| self.get(*seq))
    }

    pub(crate) fn steps(&self) -> String {
        let steps: BTreeSet<u64> = self.live.iter().map(|c| c.step).collect();
        if steps.is_empty() {
            return "none".into();
        }
        steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
    }
}
