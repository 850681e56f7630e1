//! The heartbeat that each rank writes to the store, with its newest call in each group.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A call of a group.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// The group's name.
    pub(crate) group: Arc<str>,
    /// World ranks of the group's members, in the group's order.
    pub(crate) members: Arc<[usize]>,
    pub(crate) record: CallRecord,
}

/// A call as its rank publishes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CallRecord {
    /// The call's number in its group, from 1; 0 for connecting the group.
    pub(crate) sequence: u64,
    pub(crate) collective: String,
    /// Elements of the tensor; 0 without one.
    pub(crate) count: usize,
}

/// Lifecycle phase of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) enum Phase {
    #[default]
    Running,
    /// The rank has read the world's fault.
    FaultKnown,
    /// The rank has closed its world.
    Left,
}

/// The state that a rank publishes periodically.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Heartbeat {
    pub(crate) number: u64,
    pub(crate) phase: Phase,
    /// The rank's newest call in each group, by the group's name.
    pub(crate) calls: BTreeMap<String, CallRecord>,
}

impl Heartbeat {
    /// Returns whether the rank has made this call, or a later one of its group.
    pub(crate) fn reached(&self, call: &Call) -> bool {
        self.calls.get(&*call.group).is_some_and(|record| record.sequence >= call.record.sequence)
    }

    /// Returns the different call that the rank made with this call's number, if any.
    pub(crate) fn conflicting_call(&self, call: &Call) -> Option<&CallRecord> {
        self.calls.get(&*call.group).filter(|record| record.sequence == call.record.sequence && **record != call.record)
    }
}

/// Returns the store key of a rank's heartbeat.
pub(crate) fn key(rank: usize) -> String {
    format!("heartbeat/{rank}")
}
