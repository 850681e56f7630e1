//! Derives from the log which checkpoints exist, which lineage the run is in, and which checkpoint is the best. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::log::{EntryKind, LogEntry};

/// A checkpoint according to the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Number of its log entry.
    pub seq: u64,
    /// Term of its writer.
    pub term: u64,
    /// Step after which it was taken.
    pub step: u64,
    /// Folder under the run's prefix.
    pub path: String,
    /// BLAKE3 of the manifest, hex.
    pub manifest_blake3: String,
    /// Total size of all objects, in bytes.
    pub bytes: u64,
    /// Number of objects.
    pub objects: usize,
    /// Whether it is the best of the current lineage.
    pub best: bool,
    /// Whether it is in the lineage that `auto` resumes (later checkpoints leave the lineage when a run resumes from an earlier step).
    pub current: bool,
    /// Time of the writer's clock, in Unix seconds.
    pub created_unix_s: u64,
}

/// The checkpoints that exist, oldest first, and the head of the current lineage.
#[derive(Debug, Default)]
pub(crate) struct CheckpointIndex {
    pub(crate) live: Vec<CheckpointInfo>,
    /// Log entries of the existing checkpoints of the current lineage, newest first.
    pub(crate) lineage: Vec<u64>,
    /// Whether the current lineage has ever had a checkpoint.
    pub(crate) started: bool,
}

impl CheckpointIndex {
    pub(crate) fn new(entries: &[LogEntry]) -> Self {
        let mut all: BTreeMap<u64, CheckpointInfo> = BTreeMap::new();
        let mut parents: BTreeMap<u64, Option<u64>> = BTreeMap::new();
        let mut marked_best = Vec::new();
        let mut head = None;
        for e in entries {
            match &e.kind {
                EntryKind::Checkpoint { step, path, manifest_blake3, bytes, objects } => {
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
                EntryKind::Resumed { from } => head = *from,
                EntryKind::Best { checkpoint } => marked_best.push(*checkpoint),
                EntryKind::Removed { checkpoints } => all.retain(|seq, _| !checkpoints.contains(seq)),
                EntryKind::Claim { .. } | EntryKind::Unknown => {}
            }
        }
        let mut lineage = Vec::new();
        let mut visited = BTreeSet::new();
        let mut next = head;
        while let Some(seq) = next.filter(|s| visited.insert(*s)) {
            if let Some(c) = all.get_mut(&seq) {
                c.current = true;
                lineage.push(seq);
            }
            next = parents.get(&seq).copied().flatten();
        }
        if let Some(c) = marked_best.iter().rev().find(|s| lineage.contains(s)).and_then(|s| all.get_mut(s)) {
            c.best = true;
        }
        Self { live: all.into_values().collect(), lineage, started: head.is_some() }
    }

    pub(crate) fn get(&self, seq: u64) -> Option<&CheckpointInfo> {
        self.live.iter().find(|c| c.seq == seq)
    }

    /// Returns the newest checkpoint of a step, preferring the current lineage.
    pub(crate) fn by_step(&self, step: u64) -> Option<&CheckpointInfo> {
        self.live.iter().filter(|c| c.step == step).max_by_key(|c| (c.current, c.seq))
    }

    /// Returns the newest checkpoint of the current lineage.
    pub(crate) fn newest(&self) -> Option<&CheckpointInfo> {
        self.lineage.first().and_then(|seq| self.get(*seq))
    }

    /// Lists the steps for error messages.
    pub(crate) fn steps(&self) -> String {
        let steps: BTreeSet<u64> = self.live.iter().map(|c| c.step).collect();
        if steps.is_empty() {
            return "none".into();
        }
        steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
    }
}
