//! Errors that end a training stage, each with advice.

use std::path::PathBuf;

/// Errors of the learner.
#[derive(Debug, thiserror::Error)]
pub enum LearnerError {
    /// The trainer cannot continue.
    #[error(transparent)]
    Trainer(#[from] unveil_trainer::TrainerError),
    /// The model crate reported an error.
    #[error("model: {0}")]
    Model(#[from] unveil_model::ModelError),
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
        source: unveil_preprocess::preprocessor::PreprocessError,
    },
    /// Records do not fit the model; found before the first update.
    #[error("records that do not fit the model: {0}")]
    Fit(#[from] unveil_preprocess::context_fit::FitError),
    /// A record no longer fits after augmentation.
    #[error("record \"{record}\": {source}")]
    Misfit {
        /// Id of the record.
        record: String,
        /// The cause.
        source: unveil_preprocess::context_fit::Misfit,
    },
    /// The tokenizer or processor of the model directory could not be loaded.
    #[error(transparent)]
    Processor(#[from] unveil_preprocess::preprocessor::PreprocessError),
    /// Another rank has failed or timed out.
    #[error("ranks: {0}")]
    Ranks(#[from] unveil_collective::CollectiveError),
    /// An operation of the torch extensions failed, such as allocating host memory.
    #[error(transparent)]
    Memory(#[from] unveil_torch_ext::ExtError),
    /// The experience server cannot continue.
    #[error(transparent)]
    Server(#[from] unveil_experience_rpc::ServerError),
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
    /// The contents of a checkpoint do not fit the run.
    #[error("checkpoint of step {step}: {what}")]
    CheckpointState {
        /// Step of the checkpoint.
        step: u64,
        /// Description of the problem.
        what: String,
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
