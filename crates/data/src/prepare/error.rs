//! The one error of everything between a record and a model's input. Each message says which file, image or record, and what to do.

use std::path::{Path, PathBuf};

use crate::store::ImageError;

/// Why a model directory cannot be used, or an image, question or record cannot be prepared for the model.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// A file of the model directory cannot be read or written.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file of the model directory does not hold what it should.
    #[error("{}: {cause}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        cause: String,
    },
    /// A key of a configuration file has a value that cannot be used.
    #[error("{}: `{key}` {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// The tokenizer has no such special token.
    #[error("{}: the special token {token} is missing; the tokenizer must have the vision tokens of the model's family and the tokens of the box form", path.display())]
    MissingToken {
        /// The tokenizer file.
        path: PathBuf,
        /// The token.
        token: &'static str,
    },
    /// The tokenizer failed on a text.
    #[error("tokenizer: {cause}")]
    Tokenizer {
        /// What it said.
        cause: String,
    },
    /// An image is too long or too wide for the family's resize rule.
    #[error("the image of {width} x {height} pixels has an aspect ratio of {ratio:.1}, the limit is 200")]
    Aspect {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Longer side over shorter side.
        ratio: f64,
    },
    /// An image has a size that cannot be processed.
    #[error("the image of {width} x {height} pixels {what}")]
    Size {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// What is wrong with it.
        what: String,
    },
    /// A text that must be plain holds a special token.
    #[error("the text {text:?} holds the special token {token}, which only the chat template may write")]
    SpecialInText {
        /// The text (its beginning).
        text: String,
        /// The token.
        token: String,
    },
    /// The chat template makes a prompt of text and nothing of an image.
    #[error("{}: the chat template is for text alone: it makes nothing of an image; put that of the vision-language model in its place", path.display())]
    TextTemplate {
        /// The file.
        path: PathBuf,
    },
    /// The rendered prompt has another number of image tokens than images.
    #[error("the chat template wrote {found} image placeholders for {expected} images")]
    ImageTokens {
        /// Placeholders found.
        found: usize,
        /// Images given.
        expected: usize,
    },
    /// The model family is not one of those that are built in.
    #[error("{}: model type `{found}` is not supported; supported: {}", path.display(), supported())]
    Family {
        /// The file that names it.
        path: PathBuf,
        /// What it names.
        found: String,
    },
    /// A record cannot be turned into a training answer.
    #[error("record {id}: {what}")]
    Record {
        /// The record's id.
        id: String,
        /// What is wrong.
        what: String,
    },
    /// The image cannot be decoded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Any of the above, with the name of the image it happened to.
    #[error("image {name}: {cause}")]
    Named {
        /// The image's name.
        name: String,
        /// What happened.
        cause: Box<PrepareError>,
    },
}

fn supported() -> String {
    super::Family::ALL.map(|f| f.name()).join(", ")
}

/// Reads a file of a model directory.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, PrepareError> {
    let bytes = std::fs::read(path).map_err(|cause| PrepareError::File { path: path.to_owned(), cause })?;
    if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        let cause = "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`".to_owned();
        return Err(PrepareError::Format { path: path.to_owned(), cause });
    }
    Ok(bytes)
}

/// Reads a JSON file of a model directory.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, PrepareError> {
    serde_json::from_slice(&read(path)?)
        .map_err(|e| PrepareError::Format { path: path.to_owned(), cause: e.to_string() })
}
