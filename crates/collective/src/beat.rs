//! The sign of life that each rank writes to the store, with how far it has come in each group.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// One call of one group.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// The group's name.
    pub(crate) group: Arc<str>,
    /// Ranks of the world, in the group's order.
    pub(crate) members: Arc<[usize]>,
    pub(crate) made: Made,
}

/// The newest call that a rank made in a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    pub(crate) sequence: u64,
    pub(crate) collective: String,
    /// Elements of the tensor; 0 for none.
    pub(crate) count: usize,
}

/// What a rank is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) enum Phase {
    #[default]
    Running,
    /// It knows of the world's fault.
    Told,
    /// It has closed its world.
    Left,
}

/// One sign of life.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Beat {
    pub(crate) number: u64,
    pub(crate) phase: Phase,
    /// By the group's name.
    pub(crate) calls: BTreeMap<String, Made>,
}

impl Beat {
    /// Whether the rank made this call, or a later one of its group.
    pub(crate) fn reached(&self, call: &Call) -> bool {
        self.calls.get(&*call.group).is_some_and(|made| made.sequence >= call.made.sequence)
    }

    /// What the rank did in place of this call, where that is known.
    pub(crate) fn instead(&self, call: &Call) -> Option<&Made> {
        self.calls.get(&*call.group).filter(|made| made.sequence == call.made.sequence && **made != call.made)
    }
}

/// The key of a rank's sign of life.
pub(crate) fn key(rank: usize) -> String {
    format!("beat/{rank}")
}
