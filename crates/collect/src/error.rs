//! Why collecting or reviewing stopped.

use std::path::PathBuf;

use unveil_data::records::RecordsError;
use unveil_service::chat::ChatError;

/// What went wrong; each message says where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A file cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A line of a journal or of decisions cannot be understood.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// Another run writes the journal.
    #[error("{} is in use by another run: wait for it, or give another --out", .0.display())]
    InUse(PathBuf),
    /// A prompt cannot be filled.
    #[error("prompt {name}: {what}")]
    Prompt {
        /// The file, or the built-in prompt.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// It is not said whom to ask.
    #[error(
        "collect.base_url is empty: name an OpenAI-compatible endpoint, and collect.model (--set collect.base_url=…)"
    )]
    NoEndpoint,
    /// The endpoint's settings cannot work.
    #[error(transparent)]
    Endpoint(#[from] ChatError),
    /// Records cannot be read or written.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// There is nothing to ask about.
    #[error("{}: no record with a box: nothing to ask about", .0.display())]
    Nothing(PathBuf),
}

impl CollectError {
    /// For `map_err`: an error of this path.
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |cause| Self::Io { path, cause }
    }
}
