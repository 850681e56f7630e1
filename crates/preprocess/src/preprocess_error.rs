//! The error of all steps between a record and a model's input. Each message names the file, image or record, and what to do.

use std::path::{Path, PathBuf};

use unveil_data::image_store::ImageError;

/// Why a model directory cannot be used, or an image, question or record cannot be preprocessed for the model.
#[derive(Debug, thiserror::Error)]
pub enum PreprocessError {
    /// A file of the model directory cannot be read or written.
    #[error("{}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        cause: std::io::Error,
    },
    /// A file of the model directory has invalid content.
    #[error("{}: {cause}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The parser's error message.
        cause: String,
    },
    /// A key of a configuration file has an unusable value.
    #[error("{}: `{key}` {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Name of the key.
        key: &'static str,
        /// Description of the problem.
        what: String,
    },
    /// The tokenizer lacks a special token.
    #[error("{}: the special token {token} is missing; the tokenizer must have the vision tokens of the model's family and the tokens of the box form", path.display())]
    MissingToken {
        /// Path of the tokenizer file.
        path: PathBuf,
        /// The token.
        token: &'static str,
    },
    /// The tokenizer failed on a text.
    #[error("tokenizer: {cause}")]
    Tokenizer {
        /// The tokenizer's error message.
        cause: String,
    },
    /// The aspect ratio of an image is outside the family's resize rule.
    #[error("the image of {width} x {height} pixels has an aspect ratio of {ratio:.1}, the limit is 200")]
    Aspect {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Longer side divided by shorter side.
        ratio: f64,
    },
    /// The size of an image cannot be processed.
    #[error("the image of {width} x {height} pixels {what}")]
    Size {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// Description of the problem.
        what: String,
    },
    /// A text that must be plain contains a special token.
    #[error("the text {text:?} contains the special token {token}, which only the chat template may write")]
    SpecialInText {
        /// Beginning of the text.
        text: String,
        /// The token.
        token: String,
    },
    /// The configured bounds of the resize cannot be used.
    #[error("{what}")]
    Pixels {
        /// Description of the problem, with the configuration key.
        what: String,
    },
    /// The text of prompts that is configured cannot be used.
    #[error("{what}")]
    Prompt {
        /// Description of the problem, with the configuration key.
        what: String,
    },
    /// The tokenizer does not preserve a tag by which answers are read.
    #[error("{}: the tokenizer turns the tag {tag} into {decoded:?} when it decodes it, so that answers could not be read: use another tag (answer.span)", path.display())]
    Tag {
        /// Path of the tokenizer file.
        path: PathBuf,
        /// The tag.
        tag: String,
        /// The tag, encoded and decoded.
        decoded: String,
    },
    /// The chat template renders text but ignores images.
    #[error("{}: the chat template is for text only and ignores images; replace it by the template of the vision-language model", path.display())]
    TextTemplate {
        /// The file.
        path: PathBuf,
    },
    /// The rendered prompt does not have one image placeholder per image.
    #[error("the chat template wrote {found} image placeholders for {expected} images")]
    ImageTokens {
        /// Number of placeholders found.
        found: usize,
        /// Number of images given.
        expected: usize,
    },
    /// The model family is not supported.
    #[error("{}: model type `{found}` is not supported; supported: {supported}", path.display())]
    Family {
        /// The file that names the family.
        path: PathBuf,
        /// The name in that file.
        found: String,
        /// Names of the supported families.
        supported: String,
    },
    /// A record cannot be turned into a training answer.
    #[error("record {id}: {what}")]
    Record {
        /// The record's id.
        id: String,
        /// Description of the problem.
        what: String,
    },
    /// The image cannot be decoded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Any of the other errors, with the name of the image concerned.
    #[error("image {name}: {cause}")]
    Named {
        /// The image's name.
        name: String,
        /// The underlying error.
        cause: Box<Self>,
    },
}

/// Reads a file of a model directory; a Git LFS pointer is an error.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, PreprocessError> {
    let bytes = std::fs::read(path).map_err(|cause| PreprocessError::File { path: path.to_owned(), cause })?;
    if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        let cause = "it is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`".to_owned();
        return Err(PreprocessError::Format { path: path.to_owned(), cause });
    }
    Ok(bytes)
}

/// Reads and parses a JSON file of a model directory.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, PreprocessError> {
    serde_json::from_slice(&read(path)?)
        .map_err(|e| PreprocessError::Format { path: path.to_owned(), cause: e.to_string() })
}
