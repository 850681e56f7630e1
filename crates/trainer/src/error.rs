//! Errors of an update and of what surrounds it, each with advice.

use std::path::PathBuf;

use crate::memory_plan::MemoryPlan;

/// Errors of the trainer.
#[derive(Debug, thiserror::Error)]
pub enum TrainerError {
    /// The model crate reported an error.
    #[error("model: {0}")]
    Model(#[from] unveil_model::ModelError),
    /// A loss could not be computed.
    #[error("loss: {0}")]
    Algo(#[from] unveil_algo::AlgoError),
    /// libtorch rejected an operation.
    #[error("tensor library: {0}")]
    Torch(#[from] tch::TchError),
    /// Another rank has failed or timed out.
    #[error("ranks: {0}")]
    Ranks(#[from] unveil_collective::CollectiveError),
    /// An operation of the torch extensions failed.
    #[error(transparent)]
    Extension(#[from] unveil_torch_ext::ExtError),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A setting does not fit the model or the data.
    #[error("{0}")]
    Setting(String),
    /// A dumped batch is invalid or does not fit the model.
    #[error("{path}: {what}")]
    Dump {
        /// Path of the file.
        path: PathBuf,
        /// Description of the problem.
        what: String,
    },
    /// Rollout and learner compute different log-probabilities for the same weights.
    #[error(
        "step {step}: rollout and learner disagree by {mean:.2e} mean |delta log p| (limit {limit:.0e}, learner.agreement_limit): {workers}; worst: {worst}. Check that both use the same build, model and dtype"
    )]
    Agreement {
        /// Number of the update.
        step: u64,
        /// Mean |delta log p| over tokens of the present weight version.
        mean: f64,
        /// The configured limit.
        limit: f64,
        /// The workers above the limit, the worst first.
        workers: String,
        /// The responses that disagree most.
        worst: String,
    },
    /// Too many steps in a row were skipped.
    #[error(
        "step {step}: {in_a_row} steps in a row were skipped, the last one because {why}. Lower the learning rate, or check the values named"
    )]
    Skipped {
        /// Number of the update.
        step: u64,
        /// Number of skipped steps in a row.
        in_a_row: u64,
        /// Why the last one was skipped.
        why: String,
    },
    /// An update ran out of memory.
    #[error("not enough memory for an update ({cause}). It needs: {plan}")]
    OutOfMemory {
        /// Message of libtorch.
        cause: String,
        /// Memory needed by use, and what to lower.
        plan: Box<MemoryPlan>,
    },
}

impl TrainerError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// Result of this crate.
pub type Result<T, E = TrainerError> = std::result::Result<T, E>;
