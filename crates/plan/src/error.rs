//! Errors of a plan.

/// Errors of a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No GPU in the table has this name.
    #[error("`{name}` is not a known GPU; known are {known}")]
    UnknownGpu {
        /// The given name.
        name: String,
        /// The known names.
        known: String,
    },
    /// Stage 2 has more processes than GPUs.
    #[error(
        "stage 2 has {} processes that each need a GPU ({ranks} rank(s) of the learner, {workers} rollout worker(s)), and there are {gpus}: \
         lower learner.parallel.ranks or rollout.workers, or set launch.share_gpus = true",
        ranks + workers
    )]
    TooFewGpus {
        /// Learner ranks.
        ranks: u64,
        /// Rollout workers.
        workers: u64,
        /// GPUs of all nodes.
        gpus: u64,
    },
    /// A node without GPUs.
    #[error("a node needs at least one GPU: use --gpus 1 or more")]
    NoGpus,
}
