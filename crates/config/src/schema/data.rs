//! Sections `[data]`, `[data.synth]` and `[data.augment]`: training and held-out data.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Source of the training data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DataKind {
    /// Synthetic images, generated as by `unveil data synth`.
    Synth,
    /// Pascal VOC directory `data.root`.
    Voc,
    /// Record file `data.root` (JSON lines).
    Jsonl,
}

/// Training and held-out data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// Source: `synth` (generated images), `voc` (a Pascal VOC directory) or `jsonl` (a record file).
    pub kind: DataKind,
    /// Path of the data: a directory for `voc`, a file for `jsonl`; not used for `synth`.
    pub root: String,
    /// Class name in the VOC annotations whose objects are the findings; required for `voc`.
    pub class: String,
    /// Category written in questions and answers for that VOC class.
    pub category: String,
    /// Allows images outside the directory of the record file: absolute paths, `..`, and symbolic links that lead out of it.
    pub outside: bool,
    /// Question for records without one.
    pub question: String,
    /// Synthetic data; used if `kind = "synth"`.
    pub synth: Synth,
    /// Name of the split to train on.
    pub train_split: String,
    /// Name of the split for evaluation during training and for choosing the best checkpoint; must differ from `train_split`.
    pub val_split: String,
    /// Name of the split reported in summary.json; evaluated once before and once after stage 2; must differ from `train_split`.
    pub test_split: String,
    /// Random augmentation of training images.
    pub augment: Augment,
    /// Known categories with the synonyms that count as naming them: `{"nodule" = ["nodules"]}`.
    pub synonyms: BTreeMap<String, Vec<String>>,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            kind: DataKind::Synth,
            root: String::new(),
            class: String::new(),
            category: String::new(),
            outside: false,
            question: "What is abnormal, and where?".into(),
            synth: Synth::default(),
            train_split: "train".into(),
            val_split: "val".into(),
            test_split: "test".into(),
            augment: Augment::default(),
            synonyms: Default::default(),
        }
    }
}

/// Size and seed of the synthetic data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Synth {
    /// Number of training images.
    pub train: usize,
    /// Number of validation images.
    pub val: usize,
    /// Number of test images.
    pub test: usize,
    /// Seed of the data, independent of `run.seed`.
    pub seed: u64,
    /// Side length of the images in pixels; a multiple of 16 from 48 to 448.
    #[schemars(range(min = 48, max = 448))]
    pub size: u32,
}

impl Default for Synth {
    fn default() -> Self {
        Self { train: 6000, val: 128, test: 256, seed: 7, size: 96 }
    }
}

/// Random augmentation of training images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// Smallest side of a random crop, as a fraction of the image side, above 0 up to 1; 1 disables cropping.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub crop_min: f32,
    /// Mirrors images left to right with probability 1/2.
    pub flip_horizontal: bool,
    /// Mirrors images top to bottom with probability 1/2.
    pub flip_vertical: bool,
    /// Maximum relative change of brightness and contrast, from 0 up to below 1; 0 disables it.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub jitter: f32,
}

impl Default for Augment {
    fn default() -> Self {
        Self { crop_min: 1.0, flip_horizontal: false, flip_vertical: false, jitter: 0.0 }
    }
}
