//! Errors of the code around the scorers (a scorer masks its component instead of failing).

use std::path::PathBuf;

use unveil_service::ServiceError;

/// A failure of the reward commands.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    /// The service or a call to it failed.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// A file cannot be read, or the output cannot be written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A line of the data is not usable.
    #[error("{path}:{line}: {what}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// The problem and what to do about it.
        what: String,
    },
    /// A request is not usable.
    #[error("`{field}` {what}")]
    Request {
        /// The field of the request.
        field: String,
        /// The problem with it.
        what: String,
    },
    /// A file or setting that the configuration names, or the data of a command, cannot be used.
    #[error("{what}: {why}")]
    Named {
        /// The key or file.
        what: String,
        /// The problem with it.
        why: String,
    },
    /// A secret that the configuration names is missing.
    #[error(transparent)]
    Config(#[from] unveil_config::ConfigError),
    /// The model directory that the configuration names cannot be used.
    #[error("model.dir {path}: {what}")]
    Model {
        /// The directory.
        path: PathBuf,
        /// The problem.
        what: String,
    },
}

impl RewardError {
    /// Creates an error about a field of a request.
    pub(crate) fn request(field: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Request { field: field.into(), what: what.into() }
    }
}
