//! Models from scratch: seeded initialisation of a preset. Tokenizer files are not written here.

use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Tensor;
use unveil_core::SpecialTokens;

use crate::config::parameters::{self, Init, TensorSpec};
use crate::config::preset::{Preset, preset};
use crate::weights::shards::{MAX_SHARD_BYTES, ShardPlan};
use crate::{ModelError, Result, VlmConfig};

/// Shortest and longest wavelength of the sine encoding of numbers.
const NUMBER_WAVELENGTHS: (f64, f64) = (8.0, 2048.0);

/// The model that [`init`] creates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitSpec {
    /// Model family, such as `qwen2_5_vl`.
    pub family: String,
    /// Preset of the family, such as `tiny`.
    pub preset: String,
    /// Number of tokens of the tokenizer.
    pub vocab_size: u32,
    /// Seed of the weights.
    pub seed: u64,
    /// Special tokens that the configuration names: `im_end` is the end token, `end_of_text` the padding token.
    pub special: SpecialTokens,
}

/// Writes a newly initialised model (weights and configuration) to `dir`. Equal specs give equal bytes.
///
/// # Errors
/// Returns [`ModelError::Input`] for an unknown preset or a token outside the vocabulary, and [`ModelError::Io`] if a file cannot be
/// written.
pub fn init(spec: &InitSpec, dir: &Path) -> Result<VlmConfig> {
    init_with_number_tokens(spec, &[], dir)
}

/// [`init`] for a tokenizer with one token per number: `numbers[v]` is the token id of v. Embeddings of number tokens start as a sine
/// encoding of the value instead of noise.
///
/// # Errors
/// Returns the same errors as [`init`].
pub fn init_with_number_tokens(spec: &InitSpec, numbers: &[u32], dir: &Path) -> Result<VlmConfig> {
    let preset = preset(&spec.family, &spec.preset)?;
    let config = preset_config(preset, spec)?;
    if let Some(outside) = numbers.iter().find(|id| **id >= spec.vocab_size) {
        return Err(ModelError::input(format!(
            "number token {outside} is outside the vocabulary of {}",
            spec.vocab_size
        )));
    }
    std::fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
    let mut rng = ChaCha8Rng::seed_from_u64(spec.seed);
    let specs = parameters::tensor_specs(&config);
    let plan = ShardPlan::new(&config, &specs, MAX_SHARD_BYTES);
    plan.write(dir, &mut |index| {
        let t = &specs[index];
        let values = initial_values(&mut rng, t, preset, numbers);
        Ok(Tensor::f_from_slice(&values)?.f_view(t.shape.as_slice())?.f_to_kind(config.dtype)?)
    })?;
    config.save(dir)?;
    Ok(config)
}

/// Draws the initial values of one tensor.
fn initial_values(rng: &mut ChaCha8Rng, t: &TensorSpec, preset: &Preset, numbers: &[u32]) -> Vec<f32> {
    let count = t.shape.iter().product::<i64>() as usize;
    let fan_in = t.shape.iter().skip(1).product::<i64>() as f64;
    match t.init {
        Init::Zeros => vec![0.0; count],
        Init::Ones => vec![1.0; count],
        Init::Linear => normal_values(rng, count, fan_in.powf(-0.5)),
        Init::Residual(blocks) => normal_values(rng, count, (2.0 * blocks as f64 * fan_in).powf(-0.5)),
        Init::TextQkBias => normal_values(rng, count, preset.text_qk_bias_std),
        Init::VisionQkvBias => {
            let mut values = normal_values(rng, count / 3 * 2, preset.vision_qk_bias_std);
            values.resize(count, 0.0);
            values
        }
        Init::Positions => normal_values(rng, count, preset.embed_std),
        Init::Embedding => {
            let mut values = normal_values(rng, count, preset.embed_std);
            encode_numbers(rng, &mut values, t.shape[1] as usize, numbers, preset.number_amplitude);
            values
        }
    }
}

/// Returns the configuration of a preset with the token ids of `spec`. A published shape keeps its larger embedding if the vocabulary
/// is smaller.
fn preset_config(preset: &Preset, spec: &InitSpec) -> Result<VlmConfig> {
    let s = &spec.special;
    if s.all().into_iter().any(|id| id >= spec.vocab_size) {
        return Err(ModelError::input(format!("a special token is outside the vocabulary of {}", spec.vocab_size)));
    }
    let mut config = preset.config();
    config.text.vocab_size = config.text.vocab_size.max(i64::from(spec.vocab_size));
    config.text.bos_token_id = None;
    config.text.eos_token_ids = vec![s.im_end];
    config.text.pad_token_id = Some(s.end_of_text);
    config.image_token_id = s.image_pad;
    config.video_token_id = s.video_pad;
    config.vision_start_token_id = s.vision_start;
    config.vision_end_token_id = s.vision_end;
    Ok(config)
}

/// Overwrites the embeddings of number tokens with sine and cosine of the value at geometrically spaced wavelengths, each with a
/// random phase.
fn encode_numbers(rng: &mut ChaCha8Rng, table: &mut [f32], width: usize, numbers: &[u32], amplitude: f64) {
    let half = width / 2;
    let (short, long) = NUMBER_WAVELENGTHS;
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

/// Draws normally distributed values (Box-Muller).
fn normal_values(rng: &mut ChaCha8Rng, count: usize, std: f64) -> Vec<f32> {
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
