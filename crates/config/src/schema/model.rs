//! Section `[model]`: the initial model and its input.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use unveil_core::BoxForm;

/// Initial model: a model directory, or a preset that is initialised with random weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Model directory in Hugging Face layout. Empty: a model with random weights is created from `family` and `preset`.
    pub dir: String,
    /// Model family of a model created from scratch; ignored if `dir` is set.
    pub family: String,
    /// Size preset of the family for a model created from scratch; ignored if `dir` is set.
    pub preset: String,
    /// Notation of boxes in answers: `auto` (the notation of the model family), `absolute` (pixels of the resized image), `per_mille`
    /// (thousandths of the image sides), `qwen2_vl` (thousandths between box tokens), or `llava` (fractions with three decimals).
    #[serde(with = "crate::box_form")]
    #[schemars(with = "String")]
    pub boxes: Option<BoxForm>,
    /// Minimum number of pixels of a resized image, in every role; 0 uses the value of the model directory.
    pub min_pixels: u64,
    /// Maximum number of pixels of a resized image, in every role; 0 uses the value of the model directory. It bounds the number of image
    /// tokens: one represents a square whose sides are the patch size times the merge size (28 pixels for Qwen2.5-VL, 32 for Qwen3-VL).
    pub max_pixels: u64,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            dir: String::new(),
            family: "qwen2_5_vl".into(),
            preset: "tiny".into(),
            boxes: None,
            min_pixels: 0,
            max_pixels: 0,
        }
    }
}
