//! Group slots and an index of leases by worker: groups with valid leases, and groups with expired leases on which the worker may still be
//! working. With the index, operations on one worker visit only its own groups.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use unveil_core::WeightVersion;

use crate::settings::VersionSpan;

/// Holder of a valid or expired lease.
#[derive(Debug, Clone)]
pub(crate) struct LeaseHolder {
    pub worker: String,
    pub lease: String,
    /// Number of the worker's call that got the lease; 0 for a call without a number.
    pub call: u64,
    pub min_version: WeightVersion,
    pub deadline: Duration,
    /// Last reported progress.
    pub progress: u64,
    /// Time at which the progress last increased.
    pub progressed_at: Duration,
}

impl LeaseHolder {
    pub(crate) fn is(&self, worker: &str, lease: &str) -> bool {
        self.worker == worker && self.lease == lease
    }

    /// Returns whether a worker that does not report the lease does not have it, given that it received the answers to its calls up to
    /// `answered_calls`.
    pub(crate) fn is_unknown_after(&self, answered_calls: u64) -> bool {
        self.call != 0 && self.call <= answered_calls
    }
}

/// State of a group in the window.
#[derive(Debug)]
pub(crate) enum GroupSlot<T> {
    /// Waiting for a lease. Holders in `past` may still submit it late and do not get it a second time.
    Waiting { past: Vec<LeaseHolder> },
    /// Leased to a worker. Holders in `past` may still be working on it in vain.
    Leased { holder: LeaseHolder, past: Vec<LeaseHolder> },
    /// Submitted completely.
    Ready { payload: T, teaches_nothing: bool, versions: VersionSpan, worker: String, lease: String },
    /// In the batch in training.
    Training,
    /// Looked at and replaced by a further group in the batch in training: never trained.
    Replaced,
    /// Set aside: never trained.
    SetAside { why: String },
}

impl<T> GroupSlot<T> {
    pub(crate) fn waiting() -> Self {
        Self::Waiting { past: Vec::new() }
    }

    pub(crate) fn past(&self) -> &[LeaseHolder] {
        match self {
            Self::Waiting { past } | Self::Leased { past, .. } => past,
            Self::Ready { .. } | Self::Training | Self::Replaced | Self::SetAside { .. } => &[],
        }
    }

    pub(crate) fn holder(&self) -> Option<&LeaseHolder> {
        match self {
            Self::Leased { holder, .. } => Some(holder),
            _ => None,
        }
    }

    /// Returns whether the group is waiting and `worker` cannot still be working on it.
    pub(crate) fn is_free_for(&self, worker: &str) -> bool {
        matches!(self, Self::Waiting { past } if past.iter().all(|h| h.call == 0 || h.worker != worker))
    }
}

/// Groups of one worker.
#[derive(Debug, Default)]
pub(crate) struct WorkerLeases {
    /// Time of the last call by the worker.
    pub last_seen: Duration,
    /// Groups with valid leases.
    pub current: BTreeSet<u64>,
    /// Groups with expired leases, on which the worker may still be working.
    pub past: BTreeSet<u64>,
}

impl WorkerLeases {
    pub(crate) fn groups(&self) -> Vec<u64> {
        self.current.union(&self.past).copied().collect()
    }
}

/// Groups of all workers by worker name.
#[derive(Debug, Default)]
pub(crate) struct LeaseIndex(pub BTreeMap<String, WorkerLeases>);

impl LeaseIndex {
    pub(crate) fn entry(&mut self, worker: &str) -> &mut WorkerLeases {
        self.0.entry(worker.to_owned()).or_default()
    }

    /// Adds the holders of group `g`.
    pub(crate) fn add<T>(&mut self, g: u64, slot: &GroupSlot<T>) {
        if let Some(h) = slot.holder() {
            self.entry(&h.worker).current.insert(g);
        }
        for h in slot.past() {
            self.entry(&h.worker).past.insert(g);
        }
    }

    /// Removes the holders of group `g`.
    pub(crate) fn remove<T>(&mut self, g: u64, slot: &GroupSlot<T>) {
        if let Some(leases) = slot.holder().and_then(|h| self.0.get_mut(&h.worker)) {
            leases.current.remove(&g);
        }
        for h in slot.past() {
            if let Some(leases) = self.0.get_mut(&h.worker) {
                leases.past.remove(&g);
            }
        }
    }
}
