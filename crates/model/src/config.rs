//! `config.json` and `generation_config.json` of the Qwen2.5-VL family: reads the nested layout that transformers 5
//! writes and the flat one of published checkpoints, writes the nested one. Knows no tensors.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::config_json::{ids, ids_json, read_json, write_json};
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
    /// Longest sequence the model was made for.
    pub max_position_embeddings: i64,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How many rotary frequencies follow the temporal, height and width position; sums to half the head size.
    pub mrope_section: [i64; 3],
    /// Standard deviation of a fresh initialisation.
    pub initializer_range: f64,
    /// Begin token.
    pub bos_token_id: Option<u32>,
    /// End tokens.
    pub eos_token_ids: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
}

impl TextConfig {
    /// Size of one attention head.
    pub fn head_dim(&self) -> i64 {
        self.hidden_size / self.num_attention_heads
    }
}

/// The vision tower's sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the gated MLP.
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
    /// Pixels per attention window and side.
    pub window_size: i64,
    /// Width of the merged features; equals the decoder's width.
    pub out_hidden_size: i64,
    /// Blocks that attend over the whole image.
    pub fullatt_block_indexes: Vec<usize>,
    /// Time scale of videos (kept, unused for images).
    pub tokens_per_second: i64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Standard deviation of a fresh initialisation.
    pub initializer_range: f64,
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

    /// Merged tokens per window side.
    pub fn window_cells(&self) -> i64 {
        self.window_size / self.spatial_merge_size / self.patch_size
    }
}

/// A whole model's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct VlmConfig {
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
        write_json(&dir.join("config.json"), &self.to_json())?;
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
