//! Vision-language model families: architecture, weights in Hugging Face layout, value head, attention capture, packed groups for
//! training, group KV caches for generation, and low-rank adapters.
//!
//! The interface consists of token ids, pixel patches and tensors. A [`Vlm`] belongs to one thread (tensors are not `Sync`).
//!
//! Must not depend on: communication, async runtimes, tokenizers, rewards.

mod adapters;
mod config;
mod decoder;
mod device;
mod error;
mod export;
mod family;
mod files;
mod generation;
mod layers;
mod prompt;
mod training;
mod vision;
mod vlm;
mod weights;

pub use adapters::lora::{Adapters, LoraSpec, is_adapter};
pub use adapters::peft::read_adapters;
pub use config::family::Family;
pub use config::parameters::canonical_name;
pub use config::preset::{Preset, preset, presets};
pub use config::{TextConfig, VisionAttention, VisionConfig, VlmConfig};
pub use decoder::logprob::{entropy, log_softmax, logprobs, logprobs_entropy, masked_logits};
pub use device::{GpuMemory, device, free_memory, gpu_memory};
pub use error::ModelError;
pub use export::{companion_files, copy_companion_files, export, fingerprint};
pub use generation::cache::{CacheShape, DecodeOut, GroupCache, Prefill};
pub use layers::attention::{AttentionSet, Capture, CaptureSpec};
pub use layers::ops::activation_kind;
pub use layers::rope::rope_positions;
pub use prompt::Prompt;
pub use training::packed::{PackedBatch, PackedGroup};
pub use training::tape::{Direction, LayerHook, Tape, TapeMode, Var};
pub use training::value_head::ValueHead;
pub use vlm::merge::AdapterMerger;
pub use vlm::{ForwardOut, PackedOut, Vlm};
pub use weights::init::{InitSpec, SpecialIds, init, init_with_number_tokens};
pub use weights::{read_safetensors, write_safetensors};

/// Image size in patches before merging: `[t, h, w]` (`image_grid_thw` of the Hugging Face processors).
pub type GridThw = [i64; 3];

/// Result of this crate.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;
