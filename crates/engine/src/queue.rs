//! The queue of submitted groups.

use crate::request::GroupRequest;

/// Identifies a submitted group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub(crate) u64);

/// A group in the queue.
#[derive(Debug)]
pub(crate) struct QueuedGroup {
    pub ticket: Ticket,
    pub request: GroupRequest,
}
