//! Model configuration, independent of the family: the contents of `config.json` and `generation_config.json`, with the traits of the
//! family as data. The families parse and write the text of the files.

pub(crate) mod family;
pub(crate) mod json;
pub(crate) mod parameters;
pub(crate) mod preset;
mod shape;

use serde_json::{Map, Value};
use tch::Kind;
use unveil_core::{Family, GridThw};

use crate::{ModelError, Result};

/// Sizes and traits of the decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Rows of the embedding matrix.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the gated MLP.
    pub intermediate_size: i64,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: i64,
    /// Number of key/value heads; divides `num_attention_heads`.
    pub num_key_value_heads: i64,
    /// Size of one attention head.
    pub head_dim: i64,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether queries and keys are RMS-normalised over the head before rotation.
    pub qk_norm: bool,
    /// Longest supported sequence, in tokens.
    pub max_position_embeddings: i64,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Number of rotary frequencies of the temporal, height and width axis; sums to half the head size.
    pub mrope_section: [i64; 3],
    /// Whether the axes interleave over the frequencies, instead of one block of frequencies each.
    pub mrope_interleaved: bool,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Begin token.
    pub bos_token_id: Option<u32>,
    /// End tokens.
    pub eos_token_ids: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
}

/// Sizes and traits of the vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Number of blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the MLP.
    pub intermediate_size: i64,
    /// Number of attention heads.
    pub num_heads: i64,
    /// Number of colour channels.
    pub in_channels: i64,
    /// Patch side in pixels.
    pub patch_size: i64,
    /// Frames per patch.
    pub temporal_patch_size: i64,
    /// Side of a merged token in patches.
    pub spatial_merge_size: i64,
    /// Width of the merged features; equals the width of the decoder.
    pub out_hidden_size: i64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Attention pattern and position encoding.
    pub attention: VisionAttention,
}

/// Attention pattern of the vision tower, with the position encoding and DeepStack features that come with it.
#[derive(Debug, Clone, PartialEq)]
pub enum VisionAttention {
    /// Most blocks attend within windows (Qwen2.5-VL).
    Windows {
        /// Side of an attention window in pixels.
        window_size: i64,
        /// Indices of the blocks that attend over the whole image.
        full_attention: Vec<usize>,
        /// Time scale of videos (preserved; unused for images).
        tokens_per_second: i64,
    },
    /// Every block attends over the whole image, a learned square grid of positions is interpolated over it, and the features of
    /// some blocks are added in the first decoder layers (Qwen3-VL; DeepStack, arXiv 2406.04334).
    Whole {
        /// Number of learned positions; a square number.
        positions: i64,
        /// Indices of the blocks whose features go to the decoder, ascending; the k-th block's are added after decoder layer k.
        deepstack: Vec<usize>,
    },
}

impl VisionConfig {
    /// Returns the number of values of a flattened patch.
    pub fn patch_len(&self) -> i64 {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Returns the number of patches per merged token.
    pub fn merge_unit(&self) -> i64 {
        self.spatial_merge_size * self.spatial_merge_size
    }

    /// Returns the number of merged tokens of one image; see [`VlmConfig::merged_tokens`].
    pub(crate) fn merged_tokens(&self, grid: GridThw) -> Result<usize> {
        let m = self.spatial_merge_size;
        let [t, h, w] = grid;
        if t < 1 || h < 1 || w < 1 || h % m != 0 || w % m != 0 {
            return Err(ModelError::input(format!(
                "image grid {grid:?} does not consist of {m}x{m} blocks of patches"
            )));
        }
        Ok((t * (h / m) * (w / m)) as usize)
    }

    /// Returns the blocks whose features are added in the decoder; empty without DeepStack.
    pub fn deepstack(&self) -> &[usize] {
        match &self.attention {
            VisionAttention::Windows { .. } => &[],
            VisionAttention::Whole { deepstack, .. } => deepstack,
        }
    }
}

/// Configuration of a whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct VlmConfig {
    /// Model family.
    pub family: Family,
    /// Decoder.
    pub text: TextConfig,
    /// Vision tower.
    pub vision: VisionConfig,
    /// Placeholder token of an image feature.
    pub image_token_id: u32,
    /// Placeholder token of a video feature.
    pub video_token_id: u32,
    /// Token before an image.
    pub vision_start_token_id: u32,
    /// Token after an image.
    pub vision_end_token_id: u32,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Dtype in which the weights are stored.
    pub dtype: Kind,
    /// Content of `generation_config.json`, if the file exists.
    pub generation: Option<Map<String, Value>>,
}

impl VlmConfig {
    /// Returns the number of image tokens of one image, after merging.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if the grid is empty or not a multiple of the merge size.
    pub fn merged_tokens(&self, grid: GridThw) -> Result<usize> {
        self.vision.merged_tokens(grid)
    }

    /// Returns the token ids that are never sampled, sorted: those of the tokenizer and the vision tokens. Ids outside the vocabulary have
    /// no logits to mask and are left out.
    pub fn banned_ids(&self, tokenizer: &[u32]) -> Vec<u32> {
        let vision = [self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id];
        let mut ids: Vec<u32> = tokenizer.iter().copied().chain(vision).collect();
        ids.retain(|id| i64::from(*id) < self.text.vocab_size);
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Returns the layer whose attention is captured by default: floor(2L/3).
    pub fn default_capture_layer(&self) -> usize {
        self.text.num_hidden_layers * 2 / 3
    }
}
