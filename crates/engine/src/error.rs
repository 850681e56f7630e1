//! Errors of the engine, whose messages name the group.

use unveil_model::ModelError;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A request is invalid.
    #[error("group `{group}`: {message}")]
    Request {
        /// The group's id.
        group: String,
        /// The problem, and what to do.
        message: String,
    },
    /// The number of image tokens in a prompt differs from the number of features of its images.
    #[error(
        "group `{group}`: the prompt has {tokens} image token(s), but its image(s) give {features}: \
         prompt and image do not belong together"
    )]
    ImageTokens {
        /// The group's id.
        group: String,
        /// Image placeholders in the prompt.
        tokens: usize,
        /// Merged features of the images.
        features: usize,
    },
    /// Prompt and response do not fit the model's context.
    #[error(
        "group `{group}`: {prompt} prompt tokens ({images} of them image tokens) and up to {new} new ones exceed the \
         model's context of {context}: lower max_new_tokens or the image size"
    )]
    Context {
        /// The group's id.
        group: String,
        /// Prompt tokens.
        prompt: usize,
        /// Image tokens among them.
        images: usize,
        /// Maximum number of response tokens.
        new: usize,
        /// The model's maximum number of tokens.
        context: usize,
    },
    /// Not even one group fits into memory.
    #[error(
        "group `{group}`: its {n} response(s) of up to {new} tokens after a prompt of {prompt} tokens need {} MiB, but only {} MiB \
         are available: lower the number of responses, max_new_tokens or the image size",
        needed >> 20, available >> 20
    )]
    Memory {
        /// The group's id.
        group: String,
        /// Bytes that one group needs, activations included.
        needed: u64,
        /// Available bytes.
        available: u64,
        /// Number of responses.
        n: usize,
        /// Prompt tokens.
        prompt: usize,
        /// Maximum number of response tokens.
        new: usize,
    },
    /// The model computes NaN or infinite log-probabilities.
    #[error("group `{group}`: the model computes log-probabilities that are not finite: its weights are damaged")]
    NonFinite {
        /// The group's id.
        group: String,
    },
    /// The group was aborted because another group failed.
    #[error("generation was aborted because another group failed: {0}")]
    Aborted(String),
    /// The model returned an error.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// libtorch returned an error.
    #[error("tensor library: {0}")]
    Torch(#[from] tch::TchError),
}

impl EngineError {
    pub(crate) fn request(group: &str, message: impl Into<String>) -> Self {
        Self::Request { group: group.to_owned(), message: message.into() }
    }
}
