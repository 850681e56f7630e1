//! Errors that end a worker or an offline command.

use std::path::PathBuf;

use unveil_data::image_store::ImageError;
use unveil_data::records::RecordsError;
use unveil_engine::EngineError;
use unveil_experience_rpc::ClientError;
use unveil_model::ModelError;
use unveil_preprocess::preprocessor::PreprocessError;
use unveil_service::ServiceError;

/// Reason why a rollout worker, `generate` or `score` stopped.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// The experience service cannot be used, or sent damaged weights several times.
    #[error(transparent)]
    Experience(#[from] ClientError),
    /// The reward service is unreachable or refuses permanently.
    #[error("the reward service at {address}: {source}")]
    Reward {
        /// Address of the service.
        address: String,
        /// The cause.
        source: Box<ServiceError>,
    },
    /// A leased group or a record cannot be converted to model input.
    #[error("record `{record}`: {source}")]
    Prepare {
        /// Id of the record.
        record: String,
        /// The cause.
        source: Box<PreprocessError>,
    },
    /// The model directory's processor or tokenizer cannot be read.
    #[error(transparent)]
    Processor(#[from] PreprocessError),
    /// An image cannot be read or decoded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A record file cannot be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// A line of a response file is unusable.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// The problem.
        what: String,
    },
    /// Some records or lines could not be used; each was named on stderr.
    #[error("{count} of {total} could not be used and were left out, the first: {first}")]
    LeftOut {
        /// Number of unusable records or lines.
        count: usize,
        /// Number of all records or lines.
        total: usize,
        /// Reason for the first one.
        first: Box<Self>,
    },
    /// A file cannot be read, or the output cannot be written.
    #[error("{what}: {source}")]
    Io {
        /// The file or stream.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The token or a certificate that the configuration names cannot be used, or the metrics page cannot be served.
    #[error(transparent)]
    Access(#[from] ServiceError),
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A thread or task of the worker ended; the log has its message.
    #[error("the worker's {0} ended unexpectedly")]
    Died(&'static str),
}

impl RolloutError {
    /// Creates a conversion of I/O errors of the file or stream `what`.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
