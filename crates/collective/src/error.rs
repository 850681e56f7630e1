//! Error types, and the failure record that all ranks share.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// FaultKind a call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultKind {
    /// The ranks send no heartbeats: killed, stopped, or disconnected.
    Silent,
    /// The ranks are alive but did not make the call.
    Behind,
    /// The ranks closed their world before the call.
    Left,
    /// The ranks made a different call, or one with another number of elements.
    Mismatched,
    /// All ranks made the call, but the connection between them failed.
    Transport,
}

/// The first failure of a world, the same on all ranks that could still be notified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The call: `all_reduce`, `reduce_scatter`, `all_gather`, `broadcast`, `barrier`, or `connect` while a group is being connected.
    pub collective: String,
    /// The group's name; `world` for the group of all ranks.
    pub group: String,
    /// The call's number in its group, from 1; 0 for `connect`.
    pub sequence: u64,
    /// World ranks that made the call fail; empty for [`FaultKind::Transport`].
    pub ranks: Vec<usize>,
    /// FaultKind the call failed.
    pub kind: FaultKind,
    /// The world rank that detected the failure.
    pub found_by: usize,
    /// The symptom on that rank.
    pub cause: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { collective, group, sequence, found_by, cause, .. } = self;
        let ranks = list(&self.ranks);
        write!(f, "{collective} #{sequence} of group `{group}` failed: ")?;
        match self.kind {
            FaultKind::Silent => write!(f, "{ranks} stopped sending heartbeats")?,
            FaultKind::Behind => write!(f, "{ranks} did not make this call")?,
            FaultKind::Left => write!(f, "{ranks} had left")?,
            FaultKind::Mismatched => write!(f, "{ranks} made a different call")?,
            FaultKind::Transport => write!(f, "all ranks made the call, but the connection failed")?,
        }
        write!(f, " (found by rank {found_by}: {cause}); restart the ranks")
    }
}

impl std::error::Error for Fault {}

/// Formats ranks as `rank 3` or `ranks 1, 2`.
pub(crate) fn list(ranks: &[usize]) -> String {
    let all: Vec<_> = ranks.iter().map(ToString::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, all.join(", "))
}

/// Returns the lines of a fingerprint that are not in the other one.
fn differing_lines(fingerprint: &str, other: &str) -> String {
    let other_lines: Vec<&str> = other.lines().collect();
    fingerprint.lines().filter(|line| !other_lines.contains(line)).collect::<Vec<_>>().join(", ")
}

/// Errors of this crate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CollectiveError {
    /// A call failed on some rank, and the world is closed.
    #[error(transparent)]
    Fault(#[from] Arc<Fault>),
    /// The number of elements is not a multiple of the number of ranks.
    #[error("{call}: {count} elements do not divide over {ranks} ranks; pad to a multiple of {ranks}")]
    Indivisible {
        /// The call.
        call: &'static str,
        /// Elements of the tensor.
        count: usize,
        /// Ranks of the group.
        ranks: usize,
    },
    /// The tensor is not supported by the backend or the call.
    #[error("{call}: {message}")]
    Tensor {
        /// The call.
        call: &'static str,
        /// The problem, and what is required.
        message: String,
    },
    /// The root rank is not in the group.
    #[error("{call}: there is no rank {rank} in a group of {ranks}")]
    Rank {
        /// The call.
        call: &'static str,
        /// The requested rank.
        rank: usize,
        /// Ranks of the group.
        ranks: usize,
    },
    /// The size of the mesh differs from the size of the world.
    #[error(
        "a mesh of {replicas} replicas x {shards} shards needs {} ranks, but the world has {world}",
        replicas.saturating_mul(*shards)
    )]
    Mesh {
        /// Number of replicas.
        replicas: usize,
        /// Number of shards of each replica.
        shards: usize,
        /// Size of the world.
        world: usize,
    },
    /// Ranks were missing at the rendezvous deadline.
    #[error(
        "{} of {world} did not join at {address} within {seconds:.1} s (found by rank {found_by}); start them, or raise the timeout",
        list(ranks)
    )]
    Missing {
        /// The missing ranks.
        ranks: Vec<usize>,
        /// Size of the world.
        world: usize,
        /// Address of the rendezvous.
        address: String,
        /// Seconds waited.
        seconds: f64,
        /// The rank that timed out first.
        found_by: usize,
    },
    /// A rank has another configuration or binary than rank 0.
    #[error(
        "rank {rank} was refused: it runs `{}`, but rank 0 runs `{}`; start all ranks with one binary and configuration",
        differing_lines(theirs, expected),
        differing_lines(expected, theirs)
    )]
    Fingerprint {
        /// The rank.
        rank: usize,
        /// Its fingerprint.
        theirs: String,
        /// The fingerprint of rank 0.
        expected: String,
    },
    /// Two ranks have different tokens.
    #[error(
        "{} at {address} have different tokens: give all ranks the same one, and check which other processes can reach that port",
        list(ranks)
    )]
    TokenMismatch {
        /// The rank that detected it, and the other one.
        ranks: [usize; 2],
        /// Address of the rendezvous.
        address: String,
    },
    /// Two processes have the same rank.
    #[error(
        "rank {rank} has already joined at {address}: give each process its own rank, or end the processes of an earlier run"
    )]
    DuplicateRank {
        /// The rank.
        rank: usize,
        /// Address of the rendezvous.
        address: String,
    },
    /// The setup is invalid.
    #[error("{0}")]
    Setup(String),
    /// The backend is not available on this machine.
    #[error("{backend}: {message}")]
    Backend {
        /// `gloo` or `nccl`.
        backend: &'static str,
        /// The missing requirement.
        message: String,
    },
}

/// Result of this crate.
pub type Result<T, E = CollectiveError> = std::result::Result<T, E>;
