//! What can go wrong, and the record of a failure that all ranks share.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Why a call did not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// The ranks give no sign of life: killed, stopped, or cut off.
    Silent,
    /// The ranks live but did not make the call.
    Behind,
    /// The ranks closed their world before the call.
    Left,
    /// The ranks made another call, or one of another size.
    Differs,
    /// All ranks came, but the connection between them failed.
    Transport,
}

/// The first failure of a world, the same on all ranks that could still be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The call: `all_reduce`, `reduce_scatter`, `all_gather`, `broadcast`, `barrier`, or `connect` for a group in the making.
    pub collective: String,
    /// The group's name; `world` for that of all ranks.
    pub group: String,
    /// The call's number in its group, from 1; 0 for `connect`.
    pub sequence: u64,
    /// Ranks of the world that did not come; empty for [`Why::Transport`].
    pub ranks: Vec<usize>,
    /// Why they did not.
    pub why: Why,
    /// The rank of the world that found out.
    pub found_by: usize,
    /// What that rank saw.
    pub cause: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { collective, group, sequence, found_by, cause, .. } = self;
        let ranks = list(&self.ranks);
        write!(f, "{collective} #{sequence} of group `{group}` failed: ")?;
        match self.why {
            Why::Silent => write!(f, "{ranks} gave no sign of life")?,
            Why::Behind => write!(f, "{ranks} did not make this call")?,
            Why::Left => write!(f, "{ranks} had left")?,
            Why::Differs => write!(f, "{ranks} made another call")?,
            Why::Transport => write!(f, "all ranks came, but the connection failed")?,
        }
        write!(f, " (found by rank {found_by}: {cause}); start the ranks again")
    }
}

impl std::error::Error for Fault {}

/// `rank 3`, `ranks 1, 2`.
pub(crate) fn list(ranks: &[usize]) -> String {
    let all: Vec<_> = ranks.iter().map(ToString::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, all.join(", "))
}

/// The lines of a fingerprint that the other one does not have.
fn lines_of(own: &str, other: &str) -> String {
    let theirs: Vec<&str> = other.lines().collect();
    own.lines().filter(|line| !theirs.contains(line)).collect::<Vec<_>>().join(", ")
}

/// What can go wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CollectiveError {
    /// A call failed, here or elsewhere; the world is closed.
    #[error(transparent)]
    Fault(#[from] Arc<Fault>),
    /// Elements do not divide over ranks.
    #[error("{call}: {count} elements do not divide over {ranks} ranks; pad to a multiple of {ranks}")]
    Divide {
        /// The call.
        call: &'static str,
        /// Elements of the tensor.
        count: usize,
        /// Ranks of the group.
        ranks: usize,
    },
    /// A tensor that the backend cannot take.
    #[error("{call}: {message}")]
    Tensor {
        /// The call.
        call: &'static str,
        /// What is wrong and what is needed.
        message: String,
    },
    /// No such rank.
    #[error("{call}: there is no rank {rank} in a group of {ranks}")]
    Rank {
        /// The call.
        call: &'static str,
        /// The rank that was named.
        rank: usize,
        /// Ranks of the group.
        ranks: usize,
    },
    /// A mesh of another size than the world.
    #[error(
        "a mesh of {replicas} replicas x {shards} shards needs {} ranks, but the world has {world}",
        replicas.saturating_mul(*shards)
    )]
    Mesh {
        /// Replicas.
        replicas: usize,
        /// Shards of each replica.
        shards: usize,
        /// Ranks there are.
        world: usize,
    },
    /// Ranks did not come.
    #[error(
        "{} of {world} did not come to {address} within {seconds:.1} s (found by rank {found_by}); start them, or wait longer",
        list(ranks)
    )]
    Missing {
        /// Who.
        ranks: Vec<usize>,
        /// Ranks there should be.
        world: usize,
        /// Where they should have come.
        address: String,
        /// How long they were waited for.
        seconds: f64,
        /// The rank that gave up first.
        found_by: usize,
    },
    /// A rank runs something else.
    #[error(
        "rank {rank} was refused: it runs `{}`, but rank 0 runs `{}`; start all ranks with one binary and configuration",
        lines_of(theirs, expected),
        lines_of(expected, theirs)
    )]
    Fingerprint {
        /// The rank.
        rank: usize,
        /// Its fingerprint.
        theirs: String,
        /// The fingerprint of rank 0.
        expected: String,
    },
    /// Two ranks do not know the same token.
    #[error(
        "{} of those that meet at {address} do not have the same token: give all ranks one, and look who else reaches that port",
        list(ranks)
    )]
    Token {
        /// The one that found out, and the other.
        ranks: [usize; 2],
        /// Where the ranks meet.
        address: String,
    },
    /// Two processes with one rank.
    #[error(
        "rank {rank} is at {address} already: give each process a rank of its own, or end what is left of an earlier run"
    )]
    Twice {
        /// The rank.
        rank: usize,
        /// Where the ranks meet.
        address: String,
    },
    /// A setup that cannot be.
    #[error("{0}")]
    Setup(String),
    /// The backend cannot be used here.
    #[error("{backend}: {message}")]
    Backend {
        /// `gloo` or `nccl`.
        backend: &'static str,
        /// What is missing.
        message: String,
    },
}

/// Result of this crate.
pub type Result<T, E = CollectiveError> = std::result::Result<T, E>;
