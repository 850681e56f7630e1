//! The conformance suite, the same for every backend. Ranks are real processes: the test binary, started again.

pub(crate) mod conform;
pub(crate) mod fail;
pub(crate) mod harness;

use serde::{Deserialize, Serialize};

/// Parameters that a rank process is started with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RankSpec {
    pub rank: usize,
    pub world: usize,
    pub address: String,
    pub backend: TestBackend,
    pub fingerprint: String,
    pub token: Option<String>,
    pub rendezvous_ms: u64,
    pub task: RankTask,
}

/// The backend under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TestBackend {
    Gloo,
    Nccl,
}

/// The task of all ranks of a test.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum RankTask {
    /// Makes all calls and compares them with a computation in one process.
    Conform { seed: u64 },
    /// Only joins the world.
    Join,
    /// Repeats a call, until the victim fails in the third one.
    Fail { collective: String, victim: usize, mode: FailureMode },
    /// Fails as above, among the shards of a 2 x 2 mesh.
    FailInShards { victim: usize },
    /// Rank 1 makes a different call than the others.
    DifferentCalls,
}

/// How the victim fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FailureMode {
    KillBefore,
    KillInside,
    StopBefore,
    StopInside,
    /// Stays alive, but makes no call.
    Sleep,
    /// Closes its world in an orderly way.
    Leave,
}

pub(crate) const COLLECTIVES: [&str; 5] = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"];
