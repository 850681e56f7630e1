//! A model's configuration, whatever its family: what `config.json` and `generation_config.json` say, with the family's
//! traits as data. The text of the files is the families' business. Knows no tensors.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::config_json::{ids, ids_json, read_json, write_json};
use crate::family::Family;
use crate::{GridThw, ModelError, Result};

/// The decoder's sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the gated MLP.
    pub intermediate_size: i64,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: i64,
    /// Key/value heads; divides `num_attention_heads`.
    pub num_key_value_heads: i64,
    /// Size of one attention head.
    pub head_dim: i64,
    /// Queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Queries and keys go through an RMS norm over the head before they are rotated.
    pub qk_norm: bool,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: i64,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How many rotary frequencies follow the temporal, height and width position; sums to half the head size.
    pub mrope_section: [i64; 3],
    /// The axes take turns over the frequencies, instead of one block of frequencies each.
    pub mrope_interleaved: bool,
    /// Standard deviation of a fresh initialisation.
    pub initializer_range: f64,
    /// Begin token.
    pub bos_token_id: Option<u32>,
    /// End tokens.
    pub eos_token_ids: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
}

/// The vision tower's sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// Attention heads.
    pub num_heads: i64,
    /// Colour channels.
    pub in_channels: i64,
    /// Pixels per patch side.
    pub patch_size: i64,
    /// Frames per patch.
    pub temporal_patch_size: i64,
    /// Patches per merged token and side.
    pub spatial_merge_size: i64,
    /// Width of the merged features; equals the decoder's width.
    pub out_hidden_size: i64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Standard deviation of a fresh initialisation.
    pub initializer_range: f64,
    /// How far the tower sees and where its positions come from.
    pub reach: Reach,
}

/// What sets the families' vision towers apart besides norms and MLPs.
#[derive(Debug, Clone, PartialEq)]
pub enum Reach {
    /// Most blocks attend within windows (Qwen2.5-VL).
    Windows {
        /// Pixels per attention window and side.
        window_size: i64,
        /// Blocks that attend over the whole image.
        full_attention: Vec<usize>,
        /// Time scale of videos (kept, unused for images).
        tokens_per_second: i64,
    },
    /// Every block attends over the whole image, a learned square grid of positions is stretched over it, and some
    /// blocks' features are handed to the decoder's first layers (Qwen3-VL; DeepStack, arXiv 2406.04334).
    Whole {
        /// Learned positions; a square number.
        positions: i64,
        /// Blocks whose features go to the decoder, ascending; the k-th one's are added after decoder layer k.
        deepstack: Vec<usize>,
    },
}

impl VisionConfig {
    /// Numbers per flattened patch.
    pub fn patch_len(&self) -> i64 {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches per merged token.
    pub fn merge_unit(&self) -> i64 {
        self.spatial_merge_size * self.spatial_merge_size
    }

    /// Sets of features that the decoder takes besides those that replace placeholders.
    pub fn deepstack(&self) -> &[usize] {
        match &self.reach {
            Reach::Windows { .. } => &[],
            Reach::Whole { deepstack, .. } => deepstack,
        }
    }
}

/// A whole model's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct VlmConfig {
    /// Model family.
    pub family: Family,
    /// Decoder.
    pub text: TextConfig,
    /// Vision tower.
    pub vision: VisionConfig,
    /// Placeholder of an image feature.
    pub image_token_id: u32,
    /// Placeholder of a video feature.
    pub video_token_id: u32,
    /// Opens an image.
    pub vision_start_token_id: u32,
    /// Closes an image.
    pub vision_end_token_id: u32,
    /// The output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Number kind that the weights are stored in.
    pub dtype: Kind,
    /// `generation_config.json` as it was read, if there was one.
    pub generation: Option<Map<String, Value>>,
}

impl VlmConfig {
    /// Reads `config.json` and, where present, `generation_config.json` of a model directory.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let mut config = Self::from_json(&read_json(&path)?).map_err(|m| ModelError::config(&path, m))?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            config.generation = Some(read_json(&path)?);
        }
        Ok(config)
    }

    /// Writes `config.json` and `generation_config.json`.
    pub fn save(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join("config.json"), &self.family.config_json(self))?;
        let generation = match &self.generation {
            Some(map) => Value::Object(map.clone()),
            None => json!({
                "_from_model_config": true,
                "bos_token_id": self.text.bos_token_id,
                "eos_token_id": ids_json(&self.text.eos_token_ids),
                "pad_token_id": self.text.pad_token_id,
                "transformers_version": "5.23.0",
                "use_cache": true,
            }),
        };
        write_json(&dir.join("generation_config.json"), &generation)
    }

    /// Image tokens of one image, after merging. Errors when the grid is empty or not a multiple of the merge size.
    pub fn merged_tokens(&self, grid: GridThw) -> Result<usize> {
        let m = self.vision.spatial_merge_size;
        let [t, h, w] = grid;
        if t < 1 || h < 1 || w < 1 || h % m != 0 || w % m != 0 {
            return Err(ModelError::input(format!("image grid {grid:?} is not made of {m}x{m} blocks of patches")));
        }
        Ok((t * (h / m) * (w / m)) as usize)
    }

    /// The layer whose attention is captured by default: floor(2L/3).
    pub fn default_capture_layer(&self) -> usize {
        self.text.num_hidden_layers * 2 / 3
    }

    /// End tokens: those of `generation_config.json`, else those of `config.json`.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        let own = self.generation.as_ref().and_then(|g| g.get("eos_token_id")).and_then(ids);
        own.filter(|ids| !ids.is_empty()).unwrap_or_else(|| self.text.eos_token_ids.clone())
    }
}
