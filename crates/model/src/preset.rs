//! Models from scratch: the presets' numbers and seeded initialisation. The tokenizer gives the vocabulary; its files
//! are not written here.

use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use crate::spec::{self, Fill};
use crate::weights::write_safetensors;
use crate::{ModelError, Result, TextConfig, VisionConfig, VlmConfig};

/// The numbers of one preset.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    /// Model family.
    pub family: &'static str,
    /// Name within the family.
    pub name: &'static str,
    /// Vision tower: width.
    pub vision_hidden: i64,
    /// Vision tower: blocks.
    pub vision_depth: usize,
    /// Vision tower: heads.
    pub vision_heads: i64,
    /// Vision tower: MLP width.
    pub vision_intermediate: i64,
    /// Pixels per patch side.
    pub patch_size: i64,
    /// Frames per patch.
    pub temporal_patch_size: i64,
    /// Patches per merged token and side.
    pub merge_size: i64,
    /// Pixels per window side.
    pub window_size: i64,
    /// Blocks with full attention.
    pub full_attention: &'static [usize],
    /// Decoder: width.
    pub hidden: i64,
    /// Decoder: layers.
    pub layers: usize,
    /// Decoder: query heads.
    pub heads: i64,
    /// Decoder: key/value heads.
    pub kv_heads: i64,
    /// Decoder: MLP width.
    pub intermediate: i64,
    /// Rotary frequencies per axis.
    pub mrope_section: [i64; 3],
    /// Base of the decoder's rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence.
    pub max_positions: i64,
    /// Standard deviation of the initialisation.
    pub init_std: f64,
}

const PRESETS: &[Preset] = &[Preset {
    family: "qwen2_5_vl",
    name: "tiny",
    vision_hidden: 96,
    vision_depth: 4,
    vision_heads: 4,
    vision_intermediate: 288,
    patch_size: 8,
    temporal_patch_size: 2,
    merge_size: 2,
    window_size: 48,
    full_attention: &[1, 3],
    hidden: 192,
    layers: 4,
    heads: 4,
    kv_heads: 2,
    intermediate: 576,
    mrope_section: [8, 8, 8],
    rope_theta: 10_000.0,
    max_positions: 2048,
    init_std: 0.02,
}];

/// Token ids that the configuration names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialIds {
    /// `<|image_pad|>`
    pub image_pad: u32,
    /// `<|video_pad|>`
    pub video_pad: u32,
    /// `<|vision_start|>`
    pub vision_start: u32,
    /// `<|vision_end|>`
    pub vision_end: u32,
    /// Begin token, if the family has one.
    pub bos: Option<u32>,
    /// Ends a response.
    pub eos: u32,
    /// Padding.
    pub pad: u32,
}

/// What [`init`] makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitSpec {
    /// Model family, `qwen2_5_vl`.
    pub family: String,
    /// Preset, `tiny`.
    pub preset: String,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Seed of the weights.
    pub seed: u64,
    /// Special tokens.
    pub special: SpecialIds,
}

/// Looks a preset up; the error lists those that exist.
pub fn preset(family: &str, name: &str) -> Result<&'static Preset> {
    PRESETS.iter().find(|p| p.family == family && p.name == name).ok_or_else(|| {
        let known: Vec<String> = PRESETS.iter().map(|p| format!("{}/{}", p.family, p.name)).collect();
        ModelError::input(format!("no preset `{family}/{name}`, there is: {}", known.join(", ")))
    })
}

/// Writes a model from scratch into `dir` (weights and configuration). The same spec gives the same bytes.
pub fn init(spec: &InitSpec, dir: &Path) -> Result<VlmConfig> {
    let config = config_of(preset(&spec.family, &spec.preset)?, spec)?;
    std::fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
    let mut rng = ChaCha8Rng::seed_from_u64(spec.seed);
    let mut tensors = Vec::new();
    for t in spec::tensors(&config) {
        let count = t.shape.iter().product::<i64>() as usize;
        let values = match t.fill {
            Fill::Zeros => vec![0.0; count],
            Fill::Ones => vec![1.0; count],
            Fill::NormalVision => normal(&mut rng, count, config.vision.initializer_range),
            Fill::NormalText => normal(&mut rng, count, config.text.initializer_range),
        };
        tensors.push((t.name, Tensor::f_from_slice(&values)?.f_view(t.shape.as_slice())?));
    }
    write_safetensors(&dir.join("model.safetensors"), &tensors)?;
    config.save(dir)?;
    Ok(config)
}

fn config_of(p: &Preset, spec: &InitSpec) -> Result<VlmConfig> {
    let s = &spec.special;
    let highest = [s.image_pad, s.video_pad, s.vision_start, s.vision_end, s.eos, s.pad].into_iter().chain(s.bos).max();
    if highest.is_some_and(|id| id >= spec.vocab_size) {
        return Err(ModelError::input(format!("a special token lies outside the vocabulary of {}", spec.vocab_size)));
    }
    Ok(VlmConfig {
        text: TextConfig {
            vocab_size: i64::from(spec.vocab_size),
            hidden_size: p.hidden,
            intermediate_size: p.intermediate,
            num_hidden_layers: p.layers,
            num_attention_heads: p.heads,
            num_key_value_heads: p.kv_heads,
            max_position_embeddings: p.max_positions,
            rms_norm_eps: 1e-6,
            rope_theta: p.rope_theta,
            mrope_section: p.mrope_section,
            initializer_range: p.init_std,
            bos_token_id: s.bos,
            eos_token_ids: vec![s.eos],
            pad_token_id: Some(s.pad),
        },
        vision: VisionConfig {
            depth: p.vision_depth,
            hidden_size: p.vision_hidden,
            intermediate_size: p.vision_intermediate,
            num_heads: p.vision_heads,
            in_channels: 3,
            patch_size: p.patch_size,
            temporal_patch_size: p.temporal_patch_size,
            spatial_merge_size: p.merge_size,
            window_size: p.window_size,
            out_hidden_size: p.hidden,
            fullatt_block_indexes: p.full_attention.to_vec(),
            tokens_per_second: 2,
            rope_theta: 10_000.0,
            initializer_range: p.init_std,
        },
        image_token_id: s.image_pad,
        video_token_id: s.video_pad,
        vision_start_token_id: s.vision_start,
        vision_end_token_id: s.vision_end,
        tie_word_embeddings: true,
        dtype: Kind::Float,
        generation: None,
    })
}

/// Box-Muller.
fn normal(rng: &mut ChaCha8Rng, count: usize, std: f64) -> Vec<f32> {
    let mut out = Vec::with_capacity(count + 1);
    while out.len() < count {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        let radius = (-2.0 * u.ln()).sqrt() * std;
        let (sin, cos) = (v * std::f64::consts::TAU).sin_cos();
        out.push((radius * cos) as f32);
        out.push((radius * sin) as f32);
    }
    out.truncate(count);
    out
}
