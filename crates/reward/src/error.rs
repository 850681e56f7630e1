//! What goes wrong around the scorers (the scorers themselves mask).

use std::path::PathBuf;

use unveil_service::ServiceError;

/// A failure of the reward commands.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    /// Serving or calling failed.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// A file cannot be read, or the output cannot be written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line of the data is not usable.
    #[error("{path}:{line}: {what}")]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong and what to do.
        what: String,
    },
    /// A request is not usable.
    #[error("`{field}` {what}")]
    Request {
        /// The field of the request.
        field: String,
        /// What is wrong with it.
        what: String,
    },
    /// Something that the configuration names, or the data of a command, cannot be used.
    #[error("{what}: {why}")]
    Named {
        /// Which key or file.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// A secret that the configuration names is not there.
    #[error(transparent)]
    Config(#[from] unveil_config::ConfigError),
    /// The model directory that the configuration names cannot be used.
    #[error("model.dir {path}: {what}")]
    Model {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl RewardError {
    /// A bad field of a request.
    pub(crate) fn request(field: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Request { field: field.into(), what: what.into() }
    }
}
