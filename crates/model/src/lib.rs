//! Vision-language model families: architecture, weights in Hugging Face layout, value head, attention capture,
//! packed groups for training and group caches for generation, low-rank adapters.
//!
//! Must not know: communication, asynchronous runtimes, tokenizers, rewards. Speaks token ids, pixel patches and
//! tensors. A [`Vlm`] belongs to one thread (tensors are not `Sync`).

mod attention;
mod cache;
mod config;
mod config_json;
mod decoder;
mod device;
mod error;
mod export;
mod family;
mod found;
mod fuse;
mod graph;
mod heads;
mod host;
mod init;
mod linear;
mod logprob;
mod lora;
mod merge;
mod ops;
mod packed;
mod peft;
mod place;
mod preset;
mod rope;
mod shards;
mod spec;
mod tape;
mod tree;
mod value_head;
mod vision;
mod vlm;
mod weights;
mod window;

pub use attention::{AttentionSet, Capture, CaptureSpec};
pub use cache::{CacheShape, DecodeOut, GroupCache, Prefill};
pub use config::{Reach, TextConfig, VisionConfig, VlmConfig};
pub use device::{GpuMemory, device, free_memory, gpu_memory};
pub use error::ModelError;
pub use export::{companions, copy_companions, export, fingerprint};
pub use family::Family;
pub use init::{InitSpec, SpecialIds, init, init_with_numbers};
pub use logprob::{entropy, log_softmax, logprobs, logprobs_entropy, masked_logits};
pub use lora::{Adapters, LoraSpec, is_adapter};
pub use merge::Merger;
pub use ops::wide;
pub use packed::{PackedBatch, PackedGroup};
pub use peft::read_adapters;
pub use preset::{Preset, preset, presets};
pub use rope::rope_positions;
pub use spec::own_name;
pub use tape::{Escort, Mode, Tape, Var, Way};
pub use value_head::ValueHead;
pub use vlm::{ForwardOut, PackedOut, Prompt, Vlm};
pub use weights::{read_safetensors, write_safetensors};

/// An image's size in patches before merging: `[t, h, w]` (`image_grid_thw` of the Hugging Face processors).
pub type GridThw = [i64; 3];

/// Result of this crate.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;
