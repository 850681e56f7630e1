//! The event log: what happened to each group, in order, for accounting. Owns the shape of the lines; writes no file.

use serde::{Deserialize, Serialize};
use unveil_core::{GroupId, WeightVersion};

/// One event; `ms` is milliseconds on the caller's clock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)] // the fields are named after what they hold
pub enum Event {
    /// A group was handed out.
    Leased { ms: u64, worker: String, lease: String, group: GroupId, min_version: WeightVersion },
    /// A finished group was taken; `late` when its lease had run out but nobody else had the group.
    Submitted { ms: u64, worker: String, lease: String, group: GroupId, oldest: WeightVersion, late: bool },
    /// A group came in a second time and was not counted.
    Duplicate { ms: u64, worker: String, lease: String, group: GroupId },
    /// A group was made by weights that lag too much (or are unknown) and returned to the queue.
    Stale { ms: u64, worker: String, lease: String, group: GroupId, oldest: WeightVersion, version: WeightVersion },
    /// A submission under a lease that does not hold was not counted.
    Refused { ms: u64, worker: String, lease: String, group: GroupId },
    /// A lease ran out, its worker was `silent` for too long, or its group `stalled`; the group returned to the queue.
    Expired {
        ms: u64,
        worker: String,
        lease: String,
        group: GroupId,
        silent: bool,
        #[serde(default)]
        stalled: bool,
    },
    /// A lease that had run out holds again: its worker goes on with the group, and nobody else had it.
    Renewed { ms: u64, worker: String, lease: String, group: GroupId },
    /// A group was given back, by its worker or because the worker is lost.
    Released { ms: u64, worker: String, lease: String, group: GroupId, lost: bool },
    /// A group came back without a reward, because none could be had; it returned to the queue.
    Unscored { ms: u64, worker: String, lease: String, group: GroupId, why: String },
    /// A worker could not make a group; it returned to the queue.
    Failed { ms: u64, worker: String, lease: String, group: GroupId, why: String },
    /// A submission was refused for what it holds; its group returned to the queue.
    Rejected { ms: u64, worker: String, lease: String, group: GroupId, why: String },
    /// A worker gets nothing any more.
    Quarantined { ms: u64, worker: String, why: String },
    /// A group is set aside and never trained.
    Dropped { ms: u64, group: GroupId, why: String },
    /// An update is done with a batch; the `train` event says what became of each group.
    Trained { ms: u64, step: u64, groups: Vec<GroupId> },
}
