//! Tiny models with random weights, with or without a processor and a tokenizer, and prompts for them.

use std::path::Path;

use tch::{Device, Kind};
use unveil_core::{Family, Prompt, SpecialTokens};
use unveil_model::{InitSpec, Vlm, init};
use unveil_preprocess::tokenizer::tiny::{TinyProcessorSpec, write_tiny};

/// Vocabulary size of the models without a tokenizer.
pub const VOCAB: u32 = 64;
/// Their end token.
pub const EOS: u32 = 60;
/// Their image token.
pub const IMAGE: u32 = 61;
/// Their token before an image.
pub(crate) const VISION_START: u32 = 58;
/// Their token after an image.
pub(crate) const VISION_END: u32 = 59;

/// Returns the specification of a tiny model of a family, with [`VOCAB`] tokens.
pub fn tiny_spec(family: Family, seed: u64) -> InitSpec {
    let special = SpecialTokens {
        image_pad: IMAGE,
        video_pad: 62,
        vision_start: VISION_START,
        vision_end: VISION_END,
        im_start: 57,
        im_end: EOS,
        end_of_text: 63,
    };
    InitSpec { family: family.name().into(), preset: "tiny".into(), vocab_size: VOCAB, seed, special }
}

/// Writes a tiny Qwen2.5-VL with random weights; see [`tiny_spec`].
pub fn write_model(dir: &Path, seed: u64) {
    write_model_of(Family::Qwen2_5Vl, dir, seed);
}

/// Writes a tiny model of a family with random weights; see [`tiny_spec`].
pub fn write_model_of(family: Family, dir: &Path, seed: u64) {
    init(&tiny_spec(family, seed), dir).expect("a tiny model is written");
}

/// Creates a tiny Qwen2.5-VL with random weights; see [`tiny_spec`].
pub fn model(seed: u64) -> Vlm {
    model_of(Family::Qwen2_5Vl, seed)
}

/// Creates a tiny model of a family with random weights; see [`tiny_spec`].
pub fn model_of(family: Family, seed: u64) -> Vlm {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_model_of(family, dir.path(), seed);
    Vlm::load(dir.path(), Device::Cpu, Kind::Float).expect("a tiny model loads")
}

/// Writes a complete model directory: a tiny Qwen2.5-VL with random weights, its processor and its tokenizer. Creates `dir`.
pub fn write_model_directory(dir: &Path, seed: u64) {
    std::fs::create_dir_all(dir).expect("a directory for the model");
    let vocabulary = write_tiny(dir, &TinyProcessorSpec::default()).expect("a tiny processor is written");
    let special = vocabulary.special;
    let spec = InitSpec { vocab_size: vocabulary.vocab_size, special, ..tiny_spec(Family::Qwen2_5Vl, seed) };
    init(&spec, dir).expect("a tiny model is written");
}

/// Returns prompt `k` for a model of [`tiny_spec`], and its patches: a few tokens, an image whose size depends on `k`, and a few tokens.
pub fn image_prompt(vlm: &Vlm, k: usize) -> (Prompt, Vec<f32>) {
    let merge = vlm.config().vision.spatial_merge_size;
    let height = merge * (2 + (k as i64 % 2));
    let width = merge * (2 + (k as i64 % 3));
    let cells = (height * width / merge / merge) as usize;
    let mut tokens: Vec<u32> = vec![1, 2 + k as u32, VISION_START];
    tokens.extend(vec![IMAGE; cells]);
    tokens.push(VISION_END);
    tokens.extend((0..1 + k as u32).map(|i| 10 + i));
    (Prompt { tokens, grids: vec![[1, height, width]] }, patches(vlm, height * width, k))
}

/// Returns `count` patches of image `k`.
pub fn patches(vlm: &Vlm, count: i64, k: usize) -> Vec<f32> {
    let values = count * vlm.config().vision.patch_len();
    (0..values).map(|i| ((i as f32 + 1.0) * (0.37 + k as f32)).sin()).collect()
}
