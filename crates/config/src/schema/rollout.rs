//! Section `[rollout]`: sampling and rollout workers in stage 2.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use unveil_core::LogprobKind;

/// Sampling and rollout workers in stage 2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rollout {
    /// Responses per group (prompt), 1 to 1024; algorithms that compare responses need at least 2.
    #[schemars(range(min = 1))]
    pub n: usize,
    /// Sampling temperature, above 0.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub temperature: f64,
    /// Samples from the k most probable tokens only; 0 disables the filter.
    pub top_k: usize,
    /// Samples from the smallest set of most probable tokens that reaches this probability, above 0 up to 1; 1 disables the filter.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub top_p: f64,
    /// Samples only tokens with at least this fraction of the most probable token's probability, 0 to 1; 0 disables the filter.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: f64,
    /// Distribution of the log-probabilities in rollout and learner: `tempered` (the distribution at `temperature`, before the three
    /// filters) or `untempered` (at temperature 1).
    pub logprobs: LogprobKind,
    /// Strings that end a response, in addition to the end token. Empty: the end token only.
    pub stop: Vec<String>,
    /// Maximum length of a response in tokens.
    #[schemars(range(min = 1))]
    pub max_new_tokens: usize,
    /// Groups that a worker leases and generates at a time, 1 to 4096.
    #[schemars(range(min = 1))]
    pub groups_per_lease: usize,
    /// Maximum age of the oldest token of a response, in weight versions behind the learner; 0 to 1000 and at most `learner.steps`. With 0,
    /// training is strictly on-policy: generation and training alternate, and the result does not depend on timing. Above 0, workers
    /// generate while the learner trains, and receive new weights in the middle of responses.
    #[schemars(range(min = 0, max = 1000))]
    pub max_staleness: u64,
    /// Whether groups under way keep their KV caches when new weights arrive, instead of recomputing them with the new weights. Saves one
    /// prefill of every running group per update, 15 to 25 % of the generation of a 7B model. The later tokens of such a group are sampled
    /// from new weights over keys and values of old ones; they carry the version of the old ones, so that they count as stale, not as
    /// disagreeing. Needs `max_staleness` above 0.
    pub keep_cache: bool,
    /// Seconds after the last heartbeat at which a lease expires and its groups are leased to another worker. Heartbeats renew a lease
    /// during work, so it may be shorter than the work takes.
    #[schemars(range(max = 1e8), extend("exclusiveMinimum" = 0.0))]
    pub lease_s: f64,
    /// Seconds without progress after which the groups of a live worker are leased to others. Progress is a decode step, a received part of
    /// weights or of an image, or a scored group. Must be above `reward.deadline_s` and longer than the prefill of a whole lease.
    #[schemars(range(max = 1e8), extend("exclusiveMinimum" = 0.0))]
    pub stall_s: f64,
    /// Seconds that a worker retries to reach the learner before it exits.
    #[schemars(range(max = 1e8), extend("exclusiveMinimum" = 0.0))]
    pub patience_s: f64,
    /// Failed attempts at a group (workers lost while holding it, or unable to generate it) after which the group is set aside and its
    /// record reported; 0 retries without limit.
    pub max_losses: u32,
    /// CPU threads of each rollout worker; 0 uses all cores.
    pub threads: usize,
    /// Number of rollout workers that `unveil train` starts.
    #[schemars(range(min = 1))]
    pub workers: usize,
    /// Maximum number of responses that a worker decodes in parallel; at least `n`.
    #[schemars(range(min = 1))]
    pub max_rows: usize,
    /// Memory limit of a worker for KV cache and activations, in GiB; 0 uses the memory that is free at start.
    #[schemars(range(min = 0.0))]
    pub memory_gib: f64,
    /// Transport of new weights to the workers: `grpc` (each worker fetches them) or `broadcast` (the learner broadcasts them over NCCL or
    /// Gloo).
    pub weight_sync: WeightSync,
    /// Timeout in seconds (1 to 600) for workers to join a broadcast, and for each of its collective calls; a worker that is late fetches
    /// the weights over gRPC. If a worker dies, the others wait this long for it.
    #[schemars(range(min = 1.0, max = 600.0))]
    pub broadcast_s: f64,
    /// Listen address `host:port` of a worker's Prometheus page (`/metrics`); workers on one machine need different ports. Empty: no page.
    pub metrics_listen: String,
}

/// Transport of new weights to the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightSync {
    /// Each worker fetches the weights over gRPC.
    Grpc,
    /// The learner broadcasts the weights to all subscribed workers: over NCCL if its device is a GPU, over Gloo on CPUs. Other workers,
    /// and those whose broadcast fails, fetch them over gRPC. On GPUs both ends keep a second copy of the sent weights in device memory; if
    /// it does not fit, they go through host memory.
    Broadcast,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            n: 8,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            logprobs: LogprobKind::Tempered,
            stop: Vec::new(),
            max_new_tokens: 40,
            groups_per_lease: 16,
            max_staleness: 0,
            keep_cache: false,
            lease_s: 60.0,
            stall_s: 300.0,
            patience_s: 60.0,
            max_losses: 3,
            threads: 0,
            workers: 1,
            max_rows: 256,
            memory_gib: 0.0,
            weight_sync: WeightSync::Grpc,
            broadcast_s: 10.0,
            metrics_listen: String::new(),
        }
    }
}
