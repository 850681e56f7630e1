//! What can go wrong in the engine; each message names the group.

use unveil_model::ModelError;

/// Why the engine refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A request cannot run.
    #[error("group `{group}`: {message}")]
    Request {
        /// The group's id.
        group: String,
        /// What is wrong, and what to do.
        message: String,
    },
    /// A prompt has another number of image tokens than its images give.
    #[error(
        "group `{group}`: the prompt holds {tokens} image token(s), its image(s) give {features}: \
         prompt and image do not belong together"
    )]
    ImageTokens {
        /// The group's id.
        group: String,
        /// Image placeholders in the prompt.
        tokens: usize,
        /// Merged image features.
        features: usize,
    },
    /// Prompt and response do not fit the model's context.
    #[error(
        "group `{group}`: {prompt} prompt tokens ({images} of them image tokens) and up to {new} new ones are more than the \
         model's context of {context}: lower max_new_tokens or the image size"
    )]
    Context {
        /// The group's id.
        group: String,
        /// Prompt tokens.
        prompt: usize,
        /// Image tokens among them.
        images: usize,
        /// Tokens that may be added.
        new: usize,
        /// The model's limit.
        context: usize,
    },
    /// Not even one group fits into memory.
    #[error(
        "group `{group}`: its {n} response(s) of up to {new} tokens behind a prompt of {prompt} tokens take {} MiB, there are \
         {} MiB: lower the number of responses, max_new_tokens or the image size",
        needed >> 20, available >> 20
    )]
    Memory {
        /// The group's id.
        group: String,
        /// Bytes that it takes, work included.
        needed: u64,
        /// Bytes that may be used.
        available: u64,
        /// Responses.
        n: usize,
        /// Prompt tokens.
        prompt: usize,
        /// Response tokens.
        new: usize,
    },
    /// The model's output is not a number.
    #[error("group `{group}`: the model gives log-probabilities that are not numbers: its weights are damaged")]
    NotANumber {
        /// The group's id.
        group: String,
    },
    /// What was under way was lost with another group's failure.
    #[error("generation ended with another group: {0}")]
    Lost(String),
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// libtorch refused an operation.
    #[error("tensor library: {0}")]
    Torch(#[from] tch::TchError),
}

impl EngineError {
    pub(crate) fn request(group: &str, message: impl Into<String>) -> Self {
        Self::Request { group: group.to_owned(), message: message.into() }
    }
}
