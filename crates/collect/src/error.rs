//! Errors of collecting and reviewing.

use std::path::PathBuf;

use unveil_data::records::RecordsError;
use unveil_service::chat::ChatError;

/// Error of collecting or reviewing; each message says where it occurred and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A file cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        cause: std::io::Error,
    },
    /// A line of a journal or of a decision file cannot be parsed.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// Description of the problem.
        what: String,
    },
    /// Another run uses the journal.
    #[error("{} is in use by another run: wait until it has finished, or give another --out", .0.display())]
    InUse(PathBuf),
    /// A prompt cannot be rendered.
    #[error("prompt {name}: {what}")]
    Prompt {
        /// The file, or the built-in prompt.
        name: String,
        /// Description of the problem.
        what: String,
    },
    /// The template of the review pages does not fit its values.
    #[error("review page: {0}")]
    Page(minijinja::Error),
    /// No endpoint is configured.
    #[error(
        "collect.base_url is empty: set it and collect.model to an OpenAI-compatible endpoint (--set collect.base_url=…)"
    )]
    NoEndpoint,
    /// The settings of the endpoint are invalid.
    #[error(transparent)]
    Endpoint(#[from] ChatError),
    /// Records cannot be read or written.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// There is no record with a box.
    #[error("{}: no record has a box, so there is nothing to ask about", .0.display())]
    NothingToAsk(PathBuf),
}

impl CollectError {
    /// Returns a conversion for `map_err` that adds the path.
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |cause| Self::Io { path, cause }
    }
}
