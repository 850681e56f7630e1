//! What can end a training stage, each with what to do about it.

use std::path::PathBuf;

/// Errors of the learner.
#[derive(Debug, thiserror::Error)]
pub enum LearnerError {
    /// The model room.
    #[error("model: {0}")]
    Model(#[from] unveil_model::ModelError),
    /// A loss could not be computed.
    #[error("loss: {0}")]
    Algo(#[from] unveil_algo::AlgoError),
    /// libtorch refused an operation.
    #[error("tensor library: {0}")]
    Torch(#[from] tch::TchError),
    /// An image or its record.
    #[error(transparent)]
    Image(#[from] unveil_data::store::ImageError),
    /// A prompt or answer could not be prepared.
    #[error("record \"{record}\": {source}")]
    Prepare {
        /// The record's id.
        record: String,
        /// Why.
        source: unveil_data::prepare::PrepareError,
    },
    /// Records that do not fit the model, found before the first update.
    #[error("records that do not fit the model: {0}")]
    Fit(#[from] unveil_data::fits::FitError),
    /// A record that no longer fits as augmentation has made it.
    #[error("record \"{record}\": {source}")]
    Misfit {
        /// The record's id.
        record: String,
        /// Why.
        source: unveil_data::fits::Misfit,
    },
    /// Tokenizer or processor of the model directory.
    #[error(transparent)]
    Processor(#[from] unveil_data::prepare::PrepareError),
    /// Ranks.
    #[error("ranks: {0}")]
    Ranks(#[from] unveil_collective::CollectiveError),
    /// Memory of tensors.
    #[error(transparent)]
    Memory(#[from] unveil_torch_ext::ExtError),
    /// The accounting of groups.
    #[error("experience: {0}")]
    Experience(#[from] unveil_experience::ExperienceError),
    /// Checkpoints.
    #[error("checkpoint: {0}")]
    Checkpoint(#[from] unveil_checkpoint::Error),
    /// Serving.
    #[error(transparent)]
    Service(#[from] unveil_service::ServiceError),
    /// A file of the run directory.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A setting that does not fit this model or data.
    #[error("{0}")]
    Setting(String),
    /// A dumped batch does not fit.
    #[error("{path}: {what}")]
    Dump {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// What a checkpoint holds does not fit.
    #[error("checkpoint of step {step}: {what}")]
    State {
        /// The checkpoint.
        step: u64,
        /// What is wrong.
        what: String,
    },
    /// Rollout and learner compute different log-probabilities for the same weights.
    #[error(
        "step {step}: rollout and learner disagree by {mean:.2e} mean |delta log p| (limit {limit:.0e}, learner.agreement_limit); worst: {worst}. Check that both run the same build, model and number format"
    )]
    Agreement {
        /// The step.
        step: u64,
        /// Mean over tokens made by the present version.
        mean: f64,
        /// The limit.
        limit: f64,
        /// Worst responses.
        worst: String,
    },
    /// Too many steps in a row could not be used.
    #[error(
        "step {step}: {in_a_row} steps in a row were skipped, the last one because {why}. Lower the learning rate, or look at the named values"
    )]
    Skipped {
        /// The step.
        step: u64,
        /// How many.
        in_a_row: u64,
        /// The last reason.
        why: String,
    },
    /// There is not enough memory for an update.
    #[error("not enough memory for an update ({cause}). It takes: {plan}")]
    OutOfMemory {
        /// What libtorch said.
        cause: String,
        /// What memory is needed for, and what to lower.
        plan: Box<crate::memory::MemoryPlan>,
    },
    /// The held-out evaluation failed.
    #[error("evaluation at step {step}: {source}")]
    Evaluate {
        /// The step.
        step: u64,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A background thread ended without a word.
    #[error("{0} ended unexpectedly")]
    Lost(&'static str),
}

impl LearnerError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// Result of this crate.
pub type Result<T, E = LearnerError> = std::result::Result<T, E>;
