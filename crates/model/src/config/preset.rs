//! Presets: model shapes. The small ones are calibrated for training from scratch; the published ones are for tests and measurements.

use tch::Kind;
use unveil_core::Family;

use crate::config::{TextConfig, VisionAttention, VisionConfig, VlmConfig};
use crate::{ModelError, Result};

/// A model shape and its initialisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    /// Model family.
    pub family: Family,
    /// Name, unique within the family.
    pub name: &'static str,
    /// Patch side in pixels.
    pub patch_size: i64,
    text: TextShape,
    vision: VisionShape,
    tied: bool,
    kind: Kind,
    /// Standard deviation of embeddings. Matrices have 1/sqrt(fan-in), or 1/sqrt(2 L fan-in) if they write into the residual stream
    /// of L blocks.
    pub(crate) embed_std: f64,
    /// Standard deviation of the decoder's query and key biases. If it is not 0, attention depends on positions before it has learned
    /// anything about content.
    pub(crate) text_qk_bias_std: f64,
    /// Standard deviation of the query and key biases of the vision tower.
    pub(crate) vision_qk_bias_std: f64,
    /// Amplitude of the sine encoding in the initial embeddings of number tokens, so that close numbers have close embeddings.
    pub(crate) number_amplitude: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct TextShape {
    vocab: i64,
    hidden: i64,
    layers: usize,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    intermediate: i64,
    section: [i64; 3],
    theta: f64,
    positions: i64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct VisionShape {
    hidden: i64,
    depth: usize,
    heads: i64,
    intermediate: i64,
    /// Window side in pixels and blocks with full attention (Qwen2.5-VL), or learned positions and DeepStack blocks (Qwen3-VL).
    attention: (i64, &'static [usize]),
}

/// Side of a merged token in patches, in all presets.
const MERGE_SIZE: i64 = 2;
/// Frames per patch, in all presets.
const FRAMES_PER_PATCH: i64 = 2;

/// Calibrated on synthetic lesions with one token per coordinate; the low rotary base of the decoder suits sequences of about a
/// hundred tokens.
const TINY: Preset = Preset {
    family: Family::Qwen2_5Vl,
    name: "tiny",
    patch_size: 8,
    text: TextShape {
        vocab: 0,
        hidden: 128,
        layers: 4,
        heads: 8,
        kv_heads: 4,
        head_dim: 16,
        intermediate: 384,
        section: [2, 3, 3],
        theta: 4.0,
        positions: 2048,
    },
    vision: VisionShape { hidden: 64, depth: 3, heads: 2, intermediate: 176, attention: (32, &[2]) },
    tied: true,
    kind: Kind::Float,
    embed_std: 0.1,
    text_qk_bias_std: 1.0,
    vision_qk_bias_std: 0.7,
    number_amplitude: 0.14,
};

/// [`TINY`] in the other family, whose queries and keys have no biases that could encode positions from the start.
const TINY_QWEN3: Preset = Preset {
    family: Family::Qwen3Vl,
    text: TextShape { section: [4, 2, 2], ..TINY.text },
    vision: VisionShape { intermediate: 256, attention: (144, &[0, 1]), ..TINY.vision },
    ..TINY
};

/// Common values of the published shapes.
const PUBLISHED: Preset = Preset { kind: Kind::BFloat16, embed_std: 0.02, number_amplitude: 0.0, ..TINY };

const TEXT_2_5: TextShape = TextShape {
    vocab: 151_936,
    hidden: 2048,
    layers: 36,
    heads: 16,
    kv_heads: 2,
    head_dim: 128,
    intermediate: 11_008,
    section: [16, 24, 24],
    theta: 1e6,
    positions: 128_000,
};
const TOWER_2_5: VisionShape =
    VisionShape { hidden: 1280, depth: 32, heads: 16, intermediate: 3420, attention: (112, &[7, 15, 23, 31]) };

const TEXT_3: TextShape = TextShape {
    layers: 28,
    kv_heads: 8,
    intermediate: 6144,
    section: [24, 20, 20],
    theta: 5e6,
    positions: 262_144,
    ..TEXT_2_5
};
const TOWER_3: VisionShape =
    VisionShape { hidden: 1024, depth: 24, heads: 16, intermediate: 4096, attention: (2304, &[5, 11, 17]) };

const PRESETS: &[Preset] = &[
    TINY,
    Preset { name: "3b", patch_size: 14, text: TEXT_2_5, vision: TOWER_2_5, ..PUBLISHED },
    Preset {
        name: "7b",
        patch_size: 14,
        text: TextShape {
            vocab: 152_064,
            hidden: 3584,
            layers: 28,
            heads: 28,
            kv_heads: 4,
            intermediate: 18_944,
            ..TEXT_2_5
        },
        vision: TOWER_2_5,
        tied: false,
        ..PUBLISHED
    },
    TINY_QWEN3,
    Preset { family: Family::Qwen3Vl, name: "2b", patch_size: 16, text: TEXT_3, vision: TOWER_3, ..PUBLISHED },
    Preset {
        family: Family::Qwen3Vl,
        name: "4b",
        patch_size: 16,
        text: TextShape { hidden: 2560, layers: 36, heads: 32, intermediate: 9728, ..TEXT_3 },
        vision: TOWER_3,
        ..PUBLISHED
    },
    Preset {
        family: Family::Qwen3Vl,
        name: "8b",
        patch_size: 16,
        text: TextShape { hidden: 4096, layers: 36, heads: 32, intermediate: 12_288, ..TEXT_3 },
        vision: VisionShape { hidden: 1152, depth: 27, intermediate: 4304, attention: (2304, &[8, 16, 24]), ..TOWER_3 },
        tied: false,
        ..PUBLISHED
    },
];

/// Looks up a preset.
///
/// # Errors
/// Returns [`ModelError::Input`] with the list of presets if there is no such preset.
pub fn preset(family: &str, name: &str) -> Result<&'static Preset> {
    PRESETS.iter().find(|p| p.family.name() == family && p.name == name).ok_or_else(|| {
        let known: Vec<String> = PRESETS.iter().map(|p| format!("{}/{}", p.family.name(), p.name)).collect();
        ModelError::input(format!("no preset `{family}/{name}`; available: {}", known.join(", ")))
    })
}

/// Returns the names of the presets of a family.
pub fn presets(family: &str) -> Vec<&'static str> {
    PRESETS.iter().filter(|p| p.family.name() == family).map(|p| p.name).collect()
}

impl Preset {
    /// Returns the number of parameters and their size in bytes as stored, with at least `vocabulary` tokens.
    pub fn size(&self, vocabulary: u32) -> (u64, u64) {
        let mut config = self.config();
        config.text.vocab_size = config.text.vocab_size.max(i64::from(vocabulary));
        let count = crate::config::parameters::tensor_specs(&config)
            .iter()
            .map(|t| t.shape.iter().product::<i64>() as u64)
            .sum();
        (count, count * self.kind.elt_size_in_bytes() as u64)
    }

    /// Returns the number of tokens of the published shape; 0 if the tokenizer decides.
    pub fn vocabulary(&self) -> u32 {
        self.text.vocab as u32
    }

    /// Returns the side of a merged token in patches.
    pub fn merge_size(&self) -> i64 {
        MERGE_SIZE
    }

    /// Returns the number of frames per patch.
    pub fn temporal_patch_size(&self) -> i64 {
        FRAMES_PER_PATCH
    }

    /// Returns the shape as a configuration with the published token ids.
    pub fn config(&self) -> VlmConfig {
        let t = &self.text;
        let v = &self.vision;
        let (extent, blocks) = v.attention;
        VlmConfig {
            family: self.family,
            text: TextConfig {
                vocab_size: t.vocab,
                hidden_size: t.hidden,
                intermediate_size: t.intermediate,
                num_hidden_layers: t.layers,
                num_attention_heads: t.heads,
                num_key_value_heads: t.kv_heads,
                head_dim: t.head_dim,
                qkv_bias: self.family == Family::Qwen2_5Vl,
                qk_norm: self.family == Family::Qwen3Vl,
                max_position_embeddings: t.positions,
                rms_norm_eps: 1e-6,
                rope_theta: t.theta,
                mrope_section: t.section,
                mrope_interleaved: self.family == Family::Qwen3Vl,
                initializer_range: 0.02,
                bos_token_id: Some(151_643),
                eos_token_ids: vec![151_645],
                pad_token_id: Some(151_643),
            },
            vision: VisionConfig {
                depth: v.depth,
                hidden_size: v.hidden,
                intermediate_size: v.intermediate,
                num_heads: v.heads,
                in_channels: 3,
                patch_size: self.patch_size,
                temporal_patch_size: FRAMES_PER_PATCH,
                spatial_merge_size: MERGE_SIZE,
                out_hidden_size: t.hidden,
                rope_theta: 10_000.0,
                initializer_range: 0.02,
                attention: match self.family {
                    Family::Qwen2_5Vl => VisionAttention::Windows {
                        window_size: extent,
                        full_attention: blocks.to_vec(),
                        tokens_per_second: 2,
                    },
                    Family::Qwen3Vl => VisionAttention::Whole { positions: extent, deepstack: blocks.to_vec() },
                },
            },
            image_token_id: 151_655,
            video_token_id: 151_656,
            vision_start_token_id: 151_652,
            vision_end_token_id: 151_653,
            tie_word_embeddings: self.tied,
            dtype: self.kind,
            generation: None,
        }
    }
}
