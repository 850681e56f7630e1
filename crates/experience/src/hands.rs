//! Who holds what: the groups of each worker, those whose leases hold and those whose leases ran out while it may still work on
//! them. An index beside the slots, so that what concerns one worker looks at its own groups alone. Must not know: order, versions
//! of weights.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use unveil_core::WeightVersion;

use crate::settings::VersionSpan;

/// Holder of a lease, now or until it ran out.
#[derive(Debug, Clone)]
pub(crate) struct Holder {
    pub worker: String,
    pub lease: String,
    /// The worker's call that it was handed out to; 0 = one without a number.
    pub call: u64,
    pub min_version: WeightVersion,
    pub deadline: Duration,
    /// What the worker told last of its progress, and when that grew.
    pub progress: u64,
    pub moved: Duration,
}

impl Holder {
    pub fn is(&self, worker: &str, lease: &str) -> bool {
        self.worker == worker && self.lease == lease
    }

    /// Whether the worker has said that it does not have the lease: it knows the answers to its calls up to `done`.
    pub fn unknown(&self, done: u64) -> bool {
        self.call != 0 && self.call <= done
    }
}

#[derive(Debug)]
pub(crate) enum Slot<T> {
    /// To be handed out (again); who is in `past` may still bring it in, late, and does not get it a second time.
    Waiting { past: Vec<Holder> },
    /// With a worker; others may still work on it in vain.
    Leased { holder: Holder, past: Vec<Holder> },
    /// Back and whole.
    Ready { payload: T, versions: VersionSpan, worker: String, lease: String },
    /// In the batch that the learner took.
    Training,
    /// Set aside: never trained.
    Aside { why: String },
}

impl<T> Slot<T> {
    pub fn waiting() -> Self {
        Self::Waiting { past: Vec::new() }
    }

    pub fn past(&self) -> &[Holder] {
        match self {
            Self::Waiting { past } | Self::Leased { past, .. } => past,
            Self::Ready { .. } | Self::Training | Self::Aside { .. } => &[],
        }
    }

    pub fn holder(&self) -> Option<&Holder> {
        match self {
            Self::Leased { holder, .. } => Some(holder),
            _ => None,
        }
    }

    /// Whether it waits for a worker, and `worker` has no part of it in hand.
    pub fn is_free_for(&self, worker: &str) -> bool {
        matches!(self, Self::Waiting { past } if past.iter().all(|h| h.call == 0 || h.worker != worker))
    }
}

/// One worker.
#[derive(Debug, Default)]
pub(crate) struct Hand {
    /// When it was last heard of.
    pub heard: Duration,
    /// Groups that it has leases of.
    pub holds: BTreeSet<u64>,
    /// Groups whose leases it had, and may still work on.
    pub past: BTreeSet<u64>,
}

impl Hand {
    pub fn groups(&self) -> Vec<u64> {
        self.holds.union(&self.past).copied().collect()
    }
}

/// All workers by name.
#[derive(Debug, Default)]
pub(crate) struct Hands(pub BTreeMap<String, Hand>);

impl Hands {
    pub fn of(&mut self, worker: &str) -> &mut Hand {
        self.0.entry(worker.to_owned()).or_default()
    }

    /// Notes who has part in group `g`.
    pub fn add<T>(&mut self, g: u64, slot: &Slot<T>) {
        if let Some(h) = slot.holder() {
            self.of(&h.worker).holds.insert(g);
        }
        for h in slot.past() {
            self.of(&h.worker).past.insert(g);
        }
    }

    /// Forgets who had part in group `g`.
    pub fn remove<T>(&mut self, g: u64, slot: &Slot<T>) {
        if let Some(hand) = slot.holder().and_then(|h| self.0.get_mut(&h.worker)) {
            hand.holds.remove(&g);
        }
        for h in slot.past() {
            if let Some(hand) = self.0.get_mut(&h.worker) {
                hand.past.remove(&g);
            }
        }
    }
}
