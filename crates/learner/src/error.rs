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
    /// Saves failed, and none may work any more.
    #[error(
        "the checkpoint of step {step} could not be written ({in_a_row} in a row; checkpoint.max_failures): {source}"
    )]
    Saves {
        /// The step.
        step: u64,
        /// Failures in a row.
        in_a_row: u32,
        /// The last one.
        source: Box<LearnerError>,
    },
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
        "step {step}: rollout and learner disagree by {mean:.2e} mean |delta log p| (limit {limit:.0e}, learner.agreement_limit): {workers}; worst: {worst}. Check that both run the same build, model and number format"
    )]
    Agreement {
        /// The step.
        step: u64,
        /// Mean over tokens made by the present version.
        mean: f64,
        /// The limit.
        limit: f64,
        /// The workers that disagree by more, the worst first.
        workers: String,
        /// Worst responses.
        worst: String,
    },
    /// Too many groups lack a component of their reward.
    #[error(
        "step {step}: `{component}` is masked for {masked} of the last {groups} groups (limit {limit}, learner.max_masked), most often because {reason}. What is left trains something else than was configured: mend it, or raise the limit"
    )]
    Masked {
        /// The step.
        step: u64,
        /// The component; `total` where it is the whole reward.
        component: String,
        /// Groups that lack it.
        masked: usize,
        /// Groups that were looked at.
        groups: usize,
        /// Share of them that may.
        limit: f64,
        /// The most frequent reason.
        reason: String,
    },
    /// No record is left that can be trained.
    #[error(
        "all {records} training records were set aside, the last one because it was {why}. Look at the workers rather than at the records"
    )]
    NothingLeft {
        /// Records of the data.
        records: u64,
        /// What happened to the last one.
        why: String,
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
