//! The conformance suite, the same for every backend: ranks are real processes, this test binary started again.

pub mod conform;
pub mod fail;
pub mod harness;

use serde::{Deserialize, Serialize};

/// What one rank is started with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    pub rank: usize,
    pub world: usize,
    pub address: String,
    pub backend: Kind,
    pub fingerprint: String,
    pub token: Option<String>,
    pub join_ms: u64,
    pub task: Task,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Gloo,
    Nccl,
}

/// What the ranks do together.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Task {
    /// All calls, compared with what one process computes alone.
    Conform { seed: u64 },
    /// Only come together.
    Meet,
    /// One call again and again, until a rank fails in the third.
    Fail { collective: String, victim: usize, how: How },
    /// The same in the shards of a mesh of 2 x 2.
    FailInShards { victim: usize },
    /// Rank 1 makes another call than the others.
    Differ,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    KillBefore,
    KillInside,
    StopBefore,
    StopInside,
    /// Lives, but does not come.
    Sleep,
    /// Closes its world in good order.
    Leave,
}

pub const COLLECTIVES: [&str; 5] = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"];
