//! Sections `[learner.parallel]` and `[sft.parallel]`: ranks of a training stage.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Ranks of a training stage: one process each, one GPU each if there are GPUs. The ranks communicate over NCCL on GPUs and over Gloo on CPUs,
/// by `run.device`. All ranks are started with the same configuration except for `rank`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Parallel {
    /// Number of ranks, at least 1.
    #[schemars(range(min = 1))]
    pub ranks: usize,
    /// Rank of this process, from 0. Rank 0 evaluates and saves, and hosts the experience service of stage 2.
    pub rank: usize,
    /// Rendezvous address of the ranks, `host:port`: an address of rank 0 that the others can reach. With port 0 `unveil train` picks a
    /// free port and passes it to the other ranks.
    pub rendezvous: String,
    /// ZeRO stage (arXiv 1910.02054), the state that is sharded within a replica: 0 nothing, 1 moments and master weights, 2 also
    /// gradients, 3 also parameters.
    #[schemars(range(min = 0, max = 3))]
    pub zero: u8,
    /// Number of ranks per replica that share one sharded copy; must divide `ranks`. 0 shards over all ranks.
    pub shards: usize,
    /// Timeout in seconds for all ranks to join, above 0 up to a day.
    #[schemars(range(max = 86400.0), extend("exclusiveMinimum" = 0.0))]
    pub join_s: f64,
    /// Timeout in seconds of a collective call, above 0 up to a day; evaluation and saves of rank 0 must take less.
    #[schemars(range(max = 86400.0), extend("exclusiveMinimum" = 0.0))]
    pub call_s: f64,
    /// Seconds without a heartbeat (5 to 3600) after which a rank counts as failed and all ranks exit.
    #[schemars(range(min = 5.0, max = 3600.0))]
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
