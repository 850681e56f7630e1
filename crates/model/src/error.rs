//! What can go wrong with a model, said so that the reader knows what to repair.

use std::path::{Path, PathBuf};

/// Errors of the model room.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration file is not JSON or holds values that this architecture cannot have.
    #[error("{path}: {message}")]
    Config {
        /// The file, or a word for where the configuration came from.
        path: PathBuf,
        /// What is wrong, and with which key.
        message: String,
    },
    /// Tensors that the configuration calls for are not in the directory.
    #[error("{path}: missing {count} tensor(s): {names} (expected shape of the first: {expected:?}){instead}")]
    MissingTensors {
        /// Directory or file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first names.
        names: String,
        /// Shape that the first one should have.
        expected: Vec<i64>,
        /// What is there in their place, as the end of the message; empty where nothing is.
        instead: String,
    },
    /// Tensors that the configuration does not know.
    #[error(
        "{path}: {count} tensor(s) that the configuration does not call for: {names} (found shape of the first: {found:?})"
    )]
    ExtraTensors {
        /// Directory or file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first names.
        names: String,
        /// Shape of the first one.
        found: Vec<i64>,
    },
    /// A tensor has another shape than the configuration calls for.
    #[error("{path}: tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Directory or file.
        path: PathBuf,
        /// Tensor.
        name: String,
        /// What the configuration calls for.
        expected: Vec<i64>,
        /// What is there.
        found: Vec<i64>,
    },
    /// A weights file is cut short or not a safetensors file.
    #[error("{path}: {message}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the tensor's name where known.
        message: String,
    },
    /// The number of image tokens and of image features differ.
    #[error("{tokens} image token(s) but {features} image feature(s)")]
    ImageTokens {
        /// Image placeholders among the token ids.
        tokens: i64,
        /// Feature rows given.
        features: i64,
    },
    /// A caller's input does not fit together.
    #[error("{0}")]
    Input(String),
    /// Recorded GPU work failed.
    #[error(transparent)]
    Ext(#[from] unveil_torch_ext::ExtError),
    /// libtorch refused an operation.
    #[error("tensor library: {0}")]
    Torch(#[from] tch::TchError),
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn config(path: &Path, message: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), message: message.into() }
    }

    pub(crate) fn corrupt(path: &Path, message: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), message: message.into() }
    }

    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self::Input(message.into())
    }
}

/// The first names of a list, for a message.
pub(crate) fn name_list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<&str> = names.collect();
    let more = names.len().saturating_sub(5);
    names.truncate(5);
    let mut text = names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}
