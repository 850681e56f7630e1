//! Prompts, and the settings from which every role builds the same ones.

use crate::answer::AnswerReader;
use crate::boxes::BoxForm;

/// Image size in patches before merging: `[t, h, w]` (`image_grid_thw` of the Hugging Face processors).
pub type GridThw = [i64; 3];

/// A prompt: token ids and image grids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// Token ids, one image placeholder per merged image token.
    pub tokens: Vec<u32>,
    /// Grids of the images, in order.
    pub grids: Vec<GridThw>,
}

/// Text of a prompt: a system message, and a user message in which the image stands before the text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PromptSettings {
    /// System message; empty: none, except the chat template's own.
    pub system: String,
    /// minijinja template of the user message's text, over the fields of the record; empty: the question.
    pub template: String,
    /// Text that follows the template's, unchanged.
    pub suffix: String,
    /// Question of records without one.
    pub question: String,
}

/// Settings that turn a record into model input, and a response into an answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InputSettings {
    /// Notation of boxes; `None`: the notation of the model family.
    pub boxes: Option<BoxForm>,
    /// Minimum number of pixels of a resized image; `None`: the model directory's.
    pub min_pixels: Option<u64>,
    /// Maximum number of pixels of a resized image; `None`: the model directory's.
    pub max_pixels: Option<u64>,
    /// Text of the prompt.
    pub prompt: PromptSettings,
    /// Reader of answers, which also says how training answers are written.
    pub reader: AnswerReader,
}
