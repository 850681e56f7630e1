//! What can end a worker or an offline command. One line each: what, where, what to do.

use std::path::PathBuf;

use unveil_data::prepare::PrepareError;
use unveil_data::records::RecordsError;
use unveil_data::store::ImageError;
use unveil_engine::EngineError;
use unveil_model::ModelError;
use unveil_service::ServiceError;

/// Why a rollout worker, `generate` or `score` stopped.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// A service cannot be reached, or refused for good.
    #[error("the {role} service at {address}: {source}")]
    Service {
        /// `experience` or `reward`.
        role: &'static str,
        /// Its address.
        address: String,
        /// What happened.
        source: Box<ServiceError>,
    },
    /// The peer sent something that does not hold together.
    #[error("the experience service at {address} {what}")]
    Protocol {
        /// Its address.
        address: String,
        /// What it did.
        what: String,
    },
    /// Weights arrived damaged, several times.
    #[error("weights from {address} are refused: {what}")]
    Weights {
        /// Where they came from.
        address: String,
        /// What is wrong with them.
        what: String,
    },
    /// A leased group or a record cannot be turned into model input.
    #[error("record `{record}`: {source}")]
    Prepare {
        /// The record's id.
        record: String,
        /// What is wrong.
        source: Box<PrepareError>,
    },
    /// The model directory's processor or tokenizer cannot be read.
    #[error(transparent)]
    Processor(#[from] PrepareError),
    /// An image cannot be read or decoded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A record file cannot be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// A line of a response file is not usable.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// Some records could not be used; each was named when it came up.
    #[error("{count} of {of} could not be used and were left out, the first: {first}")]
    LeftOut {
        /// How many.
        count: usize,
        /// Of how many.
        of: usize,
        /// The first reason.
        first: Box<RolloutError>,
    },
    /// A file cannot be read, or the output cannot be written.
    #[error("{what}: {source}")]
    Io {
        /// Which file or stream.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The token or a certificate that the configuration names is not there, or the page of metrics cannot be served.
    #[error(transparent)]
    Access(#[from] ServiceError),
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A thread of the worker ended; its own message is in the log.
    #[error("the worker's {0} ended unexpectedly")]
    Died(&'static str),
}

impl RolloutError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
