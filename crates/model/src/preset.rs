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
    /// Standard deviation of embeddings. Matrices have 1/sqrt(fan-in), those that write into the residual stream of L
    /// blocks 1/sqrt(2 L fan-in).
    pub embed_std: f64,
    /// Standard deviation of the decoder's query and key biases. Away from 0 attention knows positions before content.
    pub text_qk_bias_std: f64,
    /// The same in the vision tower.
    pub vision_qk_bias_std: f64,
    /// Amplitude of the sine code that number tokens start with, so that near numbers have near embeddings.
    pub number_amplitude: f64,
}

/// Calibrated on synthetic lesions with one token per coordinate; the decoder's low rotary base suits sequences of
/// about a hundred tokens.
const PRESETS: &[Preset] = &[Preset {
    family: "qwen2_5_vl",
    name: "tiny",
    vision_hidden: 64,
    vision_depth: 3,
    vision_heads: 2,
    vision_intermediate: 176,
    patch_size: 8,
    temporal_patch_size: 2,
    merge_size: 2,
    window_size: 32,
    full_attention: &[2],
    hidden: 128,
    layers: 4,
    heads: 8,
    kv_heads: 4,
    intermediate: 384,
    mrope_section: [2, 3, 3],
    rope_theta: 4.0,
    max_positions: 2048,
    embed_std: 0.1,
    text_qk_bias_std: 1.0,
    vision_qk_bias_std: 0.7,
    number_amplitude: 0.14,
}];

/// Shortest and longest wavelength of the sine code of numbers.
const NUMBER_WAVES: (f64, f64) = (8.0, 2048.0);

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
    init_with_numbers(spec, &[], dir)
}

/// [`init`] for a tokenizer with a token per number: `numbers[v]` is the id of the token for v. Their embeddings start
/// as a sine code of the value instead of noise.
pub fn init_with_numbers(spec: &InitSpec, numbers: &[u32], dir: &Path) -> Result<VlmConfig> {
    let preset = preset(&spec.family, &spec.preset)?;
    let config = config_of(preset, spec)?;
    if let Some(bad) = numbers.iter().find(|id| **id >= spec.vocab_size) {
        return Err(ModelError::input(format!(
            "number token {bad} lies outside the vocabulary of {}",
            spec.vocab_size
        )));
    }
    std::fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
    let mut rng = ChaCha8Rng::seed_from_u64(spec.seed);
    let mut tensors = Vec::new();
    for t in spec::tensors(&config) {
        let count = t.shape.iter().product::<i64>() as usize;
        let fan_in = t.shape.iter().skip(1).product::<i64>() as f64;
        let values = match t.fill {
            Fill::Zeros => vec![0.0; count],
            Fill::Ones => vec![1.0; count],
            Fill::Linear => normal(&mut rng, count, fan_in.powf(-0.5)),
            Fill::Residual(blocks) => normal(&mut rng, count, (2.0 * blocks as f64 * fan_in).powf(-0.5)),
            Fill::TextQkBias => normal(&mut rng, count, preset.text_qk_bias_std),
            Fill::VisionQkvBias => {
                let mut values = normal(&mut rng, count / 3 * 2, preset.vision_qk_bias_std);
                values.resize(count, 0.0);
                values
            }
            Fill::Embedding => {
                let mut values = normal(&mut rng, count, preset.embed_std);
                code_numbers(&mut rng, &mut values, t.shape[1] as usize, numbers, preset.number_amplitude);
                values
            }
        };
        tensors.push((t.name, Tensor::f_from_slice(&values)?.f_view(t.shape.as_slice())?));
    }
    write_safetensors(&dir.join("model.safetensors"), &tensors)?;
    config.save(dir)?;
    Ok(config)
}

/// Overwrites the rows of number tokens: sine and cosine of the value at geometrically spaced wavelengths, each with a
/// random phase.
fn code_numbers(rng: &mut ChaCha8Rng, table: &mut [f32], width: usize, numbers: &[u32], amplitude: f64) {
    let half = width / 2;
    let (short, long) = NUMBER_WAVES;
    let waves: Vec<(f64, f64)> = (0..half)
        .map(|k| {
            let share = k as f64 / (half.max(2) - 1) as f64;
            (std::f64::consts::TAU / (short * (long / short).powf(share)), rng.random::<f64>() * std::f64::consts::TAU)
        })
        .collect();
    for (value, id) in numbers.iter().enumerate() {
        let row = &mut table[*id as usize * width..(*id as usize + 1) * width];
        for (k, (rate, phase)) in waves.iter().enumerate() {
            let (sin, cos) = (value as f64 * rate + phase).sin_cos();
            row[k] = (sin * amplitude) as f32;
            row[half + k] = (cos * amplitude) as f32;
        }
    }
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
            initializer_range: 0.02,
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
            initializer_range: 0.02,
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
