//! Errors that end a training stage, each with advice.

use std::path::PathBuf;

/// Errors of the learner.
#[derive(Debug, thiserror::Error)]
pub enum LearnerError {
    /// The model crate reported an error.
    #[error("model: {0}")]
    Model(#[from] unveil_model::ModelError),
    /// A loss could not be computed.
    #[error("loss: {0}")]
    Algo(#[from] unveil_algo::AlgoError),
    /// libtorch rejected an operation.
    #[error("tensor library: {0}")]
    Torch(#[from] tch::TchError),
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] unveil_data::image_store::ImageError),
    /// A prompt or answer could not be preprocessed.
    #[error("record \"{record}\": {source}")]
    Prepare {
        /// Id of the record.
        record: String,
        /// The cause.
        source: unveil_data::preprocessor::PreprocessError,
    },
    /// Records do not fit the model; found before the first update.
    #[error("records that do not fit the model: {0}")]
    Fit(#[from] unveil_data::context_fit::FitError),
    /// A record no longer fits after augmentation.
    #[error("record \"{record}\": {source}")]
    Misfit {
        /// Id of the record.
        record: String,
        /// The cause.
        source: unveil_data::context_fit::Misfit,
    },
    /// The tokenizer or processor of the model directory could not be loaded.
    #[error(transparent)]
    Processor(#[from] unveil_data::preprocessor::PreprocessError),
    /// Another rank has failed or timed out.
    #[error("ranks: {0}")]
    Ranks(#[from] unveil_collective::CollectiveError),
    /// An operation of the torch extensions failed, such as allocating host memory.
    #[error(transparent)]
    Memory(#[from] unveil_torch_ext::ExtError),
    /// The accounting of groups failed.
    #[error("experience: {0}")]
    Experience(#[from] unveil_experience::ExperienceError),
    /// A checkpoint could not be read or written.
    #[error("checkpoint: {0}")]
    Checkpoint(#[from] unveil_checkpoint::Error),
    /// Too many saves in a row failed.
    #[error(
        "the checkpoint of step {step} could not be written ({in_a_row} in a row; checkpoint.max_failures): {source}"
    )]
    SavesFailed {
        /// Step of the last checkpoint that failed.
        step: u64,
        /// Number of failures in a row.
        in_a_row: u32,
        /// The last failure.
        source: Box<LearnerError>,
    },
    /// A service could not be started or reached.
    #[error(transparent)]
    Service(#[from] unveil_service::ServiceError),
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
    /// The contents of a checkpoint do not fit the run.
    #[error("checkpoint of step {step}: {what}")]
    CheckpointState {
        /// Step of the checkpoint.
        step: u64,
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
    /// Too many groups lack a component of their reward.
    #[error(
        "step {step}: `{component}` is masked for {masked} of the last {groups} groups (limit {limit}, learner.max_masked), most often because {reason}. The remaining rewards train something other than what was configured: fix the component, or raise the limit"
    )]
    Masked {
        /// Number of the update.
        step: u64,
        /// The component; `total` for the whole reward.
        component: String,
        /// Number of groups that lack it.
        masked: usize,
        /// Number of groups in the window.
        groups: usize,
        /// Largest allowed share of groups that lack it.
        limit: f64,
        /// The most frequent reason.
        reason: String,
    },
    /// All training records have been set aside.
    #[error(
        "all {records} training records were set aside, the last one because it was {why}. The cause is probably in the workers rather than in the records"
    )]
    AllRecordsDropped {
        /// Number of training records.
        records: u64,
        /// Why the last one was set aside.
        why: String,
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
        plan: Box<crate::memory_plan::MemoryPlan>,
    },
    /// The held-out evaluation failed.
    #[error("evaluation at step {step}: {source}")]
    Evaluate {
        /// Number of updates before it.
        step: u64,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A background thread ended without reporting an error.
    #[error("{0} ended unexpectedly")]
    ThreadEnded(&'static str),
}

impl LearnerError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// Result of this crate.
pub type Result<T, E = LearnerError> = std::result::Result<T, E>;
