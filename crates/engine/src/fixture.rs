//! A tiny model with random weights, and prompts, for the tests of this crate.

use std::sync::Arc;

use unveil_core::{Prompt, Sampling};
use unveil_model::{Family, InitSpec, SpecialIds, Vlm, init};

use crate::{GroupRequest, PromptInput};

pub(crate) const VOCAB: u32 = 64;
pub(crate) const EOS: u32 = 60;
pub(crate) const IMAGE: u32 = 61;

/// Creates a tiny model with random weights.
pub(crate) fn model(seed: u64) -> Vlm {
    model_of(Family::Qwen2_5Vl, seed)
}

/// Creates a tiny model of a family.
pub(crate) fn model_of(family: Family, seed: u64) -> Vlm {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let special =
        SpecialIds { image_pad: IMAGE, video_pad: 62, vision_start: 58, vision_end: 59, bos: None, eos: EOS, pad: 63 };
    let spec = InitSpec { family: family.name().into(), preset: "tiny".into(), vocab_size: VOCAB, seed, special };
    init(&spec, dir.path()).unwrap();
    Vlm::load(dir.path(), tch::Device::Cpu, tch::Kind::Float).unwrap()
}

/// Creates prompt `k`: a few tokens, an image whose size depends on `k`, and a few tokens.
pub(crate) fn input(vlm: &Vlm, k: usize) -> PromptInput {
    let v = &vlm.config().vision;
    let merge = v.spatial_merge_size;
    let h = merge * (2 + (k as i64 % 2));
    let w = merge * (2 + (k as i64 % 3));
    let cells = (h * w / merge / merge) as usize;
    let mut tokens: Vec<u32> = vec![1, 2 + k as u32, 58];
    tokens.extend(vec![IMAGE; cells]);
    tokens.push(59);
    tokens.extend((0..1 + k as u32).map(|i| 10 + i));
    let patches: Vec<f32> = (0..h * w * v.patch_len()).map(|i| ((i as f32 + 1.0) * (0.37 + k as f32)).sin()).collect();
    PromptInput {
        id: format!("g{k}"),
        prompt: Prompt { tokens, grids: vec![[1, h, w]] },
        patches: Arc::new(patches),
        hashes: vec![],
    }
}

/// Creates a request for prompt `k`.
pub(crate) fn request(vlm: &Vlm, k: usize, temperature: f64) -> GroupRequest {
    let sampling = Sampling { n: 4, temperature, max_new_tokens: 12, seed: 5, ..Default::default() };
    GroupRequest { input: input(vlm, k), key: 100 + k as u64, sampling, stop: None }
}
