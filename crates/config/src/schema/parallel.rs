//! The section `[learner.parallel]`: the learner's ranks.

use serde::{Deserialize, Serialize};

/// The ranks of the learner: one process each, with a GPU each where there are some. `run.device` says whether they talk by NCCL
/// (GPUs) or Gloo (CPUs). Every rank is started with the same configuration but for `rank`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    /// Ranks in all.
    pub ranks: usize,
    /// This rank, from 0; rank 0 hosts the experience service, evaluates and saves.
    pub rank: usize,
    /// Where the ranks meet, `host:port`: an address of rank 0 that the others reach. With port 0 `train` tells the others.
    pub rendezvous: String,
    /// What is divided over the shards of a replica (ZeRO, arXiv 1910.02054): 0 = nothing, 1 = moments and master weights, 2 =
    /// gradients too, 3 = parameters too.
    pub zero: u8,
    /// Ranks of a replica that share one copy of what is divided; 0 = all ranks. Must divide `ranks`.
    pub shards: usize,
    /// Seconds for all ranks to come together.
    pub join_s: f64,
    /// Seconds that a call among ranks may take; rank 0 evaluates and saves in less.
    pub call_s: f64,
    /// A rank without a sign of life for so many seconds is gone, and all ranks end.
    pub lost_s: f64,
}

impl Default for Parallel {
    fn default() -> Self {
        Self {
            ranks: 1,
            rank: 0,
            rendezvous: "127.0.0.1:0".into(),
            zero: 0,
            shards: 0,
            join_s: 300.0,
            call_s: 1800.0,
            lost_s: 10.0,
        }
    }
}
