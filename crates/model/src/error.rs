//! Errors of this crate. Messages name the file, tensor or key to fix.

use std::path::{Path, PathBuf};

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// A configuration file is not JSON or contains values that this architecture does not support.
    #[error("{path}: {message}")]
    Config {
        /// The file, or where the configuration came from.
        path: PathBuf,
        /// Description of the problem, with the key.
        message: String,
    },
    /// Tensors that the configuration requires are not in the directory.
    #[error("{path}: missing {count} tensor(s): {names} (expected shape of the first: {expected:?}){instead}")]
    MissingTensors {
        /// Directory or file.
        path: PathBuf,
        /// Number of missing tensors.
        count: usize,
        /// Their names, shortened to the first few.
        names: String,
        /// Expected shape of the first one.
        expected: Vec<i64>,
        /// End of the message: the tensors found instead; empty if there are none.
        instead: String,
    },
    /// The directory contains tensors that the configuration does not use.
    #[error(
        "{path}: {count} tensor(s) that the configuration does not use: {names} (found shape of the first: {found:?})"
    )]
    ExtraTensors {
        /// Directory or file.
        path: PathBuf,
        /// Number of extra tensors.
        count: usize,
        /// Their names, shortened to the first few.
        names: String,
        /// Shape of the first one.
        found: Vec<i64>,
    },
    /// A tensor has a different shape than the configuration requires.
    #[error("{path}: tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Directory or file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// Shape that the configuration requires.
        expected: Vec<i64>,
        /// Shape of the tensor.
        found: Vec<i64>,
    },
    /// A weights file is truncated, or not a safetensors file.
    #[error("{path}: {message}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Description of the problem, with the tensor's name if known.
        message: String,
    },
    /// The number of image tokens and of image features differ.
    #[error("{tokens} image token(s) but {features} image feature(s)")]
    ImageTokens {
        /// Image placeholders among the token ids.
        tokens: i64,
        /// Rows of image features.
        features: i64,
    },
    /// The caller's arguments are invalid or inconsistent.
    #[error("{0}")]
    Input(String),
    /// A call to the C++ shim failed.
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

/// Number of names that a message lists.
const MAX_NAMES: usize = 5;

/// Formats the first few names of a list for a message.
pub(crate) fn name_list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<&str> = names.collect();
    let more = names.len().saturating_sub(MAX_NAMES);
    names.truncate(MAX_NAMES);
    let mut text = names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// Formats the error for quantised weights; `how` describes the quantisation.
pub(crate) fn quantised_error(how: &str) -> String {
    format!(
        "the weights are quantised ({how}), which is not supported: use the original model, or save it dequantised \
         (transformers: model.dequantize())"
    )
}

/// Returns the tensor of an operation in the C++ shim. Panics with libtorch's message if it failed, as tch's own operations do; the trainer
/// reads these messages.
pub(crate) fn or_panic(result: unveil_torch_ext::Result<tch::Tensor>) -> tch::Tensor {
    result.unwrap_or_else(|e| panic!("{e}"))
}
