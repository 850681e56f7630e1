//! Events of the state machine for the event log and for accounting. This module defines the format of the lines but writes no file.

use serde::{Deserialize, Serialize};
use unveil_core::{GroupId, WeightVersion};

/// One event; `ms` is milliseconds on the caller's clock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)] // field names are self-explanatory
pub enum Event {
    /// A group was leased.
    Leased { ms: u64, worker: String, lease: String, group: GroupId, min_version: WeightVersion },
    /// A complete group was accepted; `late` if its lease had expired but no other worker had the group.
    Submitted { ms: u64, worker: String, lease: String, group: GroupId, oldest: WeightVersion, late: bool },
    /// A group was submitted a second time and not counted.
    Duplicate { ms: u64, worker: String, lease: String, group: GroupId },
    /// A group was generated with weights that are too stale or unknown, and returned to the queue.
    Stale { ms: u64, worker: String, lease: String, group: GroupId, oldest: WeightVersion, version: WeightVersion },
    /// A submission under an invalid lease was not counted.
    Refused { ms: u64, worker: String, lease: String, group: GroupId },
    /// A lease expired, its worker was `silent` for too long, or its group `stalled`; the group returned to the queue.
    Expired {
        ms: u64,
        worker: String,
        lease: String,
        group: GroupId,
        silent: bool,
        #[serde(default)]
        stalled: bool,
    },
    /// An expired lease became valid again: its worker continues with the group, and no other worker had it.
    Renewed { ms: u64, worker: String, lease: String, group: GroupId },
    /// A group was returned by its worker or because the worker was lost.
    Released { ms: u64, worker: String, lease: String, group: GroupId, lost: bool },
    /// A group returned to the queue because no reward was available.
    Unscored { ms: u64, worker: String, lease: String, group: GroupId, why: String },
    /// A group returned to the queue because a worker could not generate it.
    Failed { ms: u64, worker: String, lease: String, group: GroupId, why: String },
    /// A submission was rejected because of its content; its group returned to the queue.
    Rejected { ms: u64, worker: String, lease: String, group: GroupId, why: String },
    /// A worker was quarantined and gets no more leases.
    Quarantined { ms: u64, worker: String, why: String },
    /// A group was set aside and is never trained.
    Dropped { ms: u64, group: GroupId, why: String },
    /// A group was looked at and replaced by a further one, because its responses teach nothing. It is never trained.
    Replaced { ms: u64, worker: String, lease: String, group: GroupId, oldest: WeightVersion },
    /// An update of a batch is complete; the `train` event has the outcome of each group.
    Trained { ms: u64, step: u64, groups: Vec<GroupId> },
}
