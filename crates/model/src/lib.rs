//! Vision-language model families: architecture, weights in Hugging Face layout, value head, attention capture, packed groups for
//! training, group KV caches for generation, and low-rank adapters.
//!
//! The interface consists of token ids, pixel patches and tensors. A [`Vlm`] belongs to one thread (tensors are not `Sync`).
//!
//! Must not depend on: communication, async runtimes, tokenizers, rewards.
//!
//! # Examples
//! A tiny model with random weights, and its logits for three tokens:
//! ```
//! use tch::{Device, Kind, Tensor};
//! use unveil_core::SpecialTokens;
//! use unveil_model::{InitSpec, Vlm, init};
//!
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path();
//! let special = SpecialTokens { image_pad: 3, video_pad: 4, vision_start: 5, vision_end: 6, im_start: 2, im_end: 1, end_of_text: 0 };
//! let spec = InitSpec { family: "qwen2_5_vl".to_owned(), preset: "tiny".to_owned(), vocab_size: 300, seed: 7, special };
//! init(&spec, dir)?;
//! let vlm = Vlm::load(dir, Device::Cpu, Kind::Float)?;
//!
//! let tokens = Tensor::from_slice(&[10i64, 11, 12]).unsqueeze(0);
//! let positions = Tensor::arange(3i64, (Kind::Int64, Device::Cpu)).repeat([3, 1, 1]);
//! let out = tch::no_grad(|| vlm.forward(&tokens, None, &positions, None, None))?;
//! assert_eq!(vlm.lm_head(&out.hidden).size(), [1, 3, 300]);
//! assert_eq!(vlm.config().text.num_hidden_layers, 4);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod adapters;
mod compute;
mod config;
mod decoder;
mod device;
mod dtype;
mod error;
mod export;
mod family;
mod files;
mod generation;
mod layers;
mod training;
mod vision;
mod vlm;
mod weights;

pub use adapters::lora::{Adapters, LoraSpec, is_adapter};
pub use adapters::peft::{AdapterFiles, read_adapter_files, read_adapters};
pub use compute::agreement_limit;
pub use config::parameters::canonical_name;
pub use config::preset::{Preset, preset, presets};
pub use config::{TextConfig, VisionAttention, VisionConfig, VlmConfig};
pub use decoder::logprob::{entropy, log_softmax, logprobs, logprobs_entropy, masked_logits};
pub use device::device;
pub use dtype::{dtype_name, parse_dtype, weight_kind};
pub use error::ModelError;
pub use export::{check_adapter_base, companion_files, copy_companion_files, export, fingerprint, record_adapter_base};
pub use generation::cache::{CacheShape, DecodeOut, GroupCache, Prefill};
pub use layers::attention::{AttentionSet, Capture, CaptureSpec};
pub use layers::dropout::AdapterDropout;
pub use layers::ops::activation_kind;
pub use layers::rope::rope_positions;
pub use training::packed::{PackedBatch, PackedGroup};
pub use training::tape::{Direction, LayerHook, Tape, TapeMode, Var};
pub use training::value_head::ValueHead;
pub use vlm::merge::AdapterMerger;
pub use vlm::{ForwardOut, PackedOut, Vlm};
pub use weights::init::{InitSpec, init, init_with_number_tokens};
pub use weights::{read_safetensors, write_safetensors};

/// Result of this crate.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    /// Reruns unit tests that compute with other instruction sets of libtorch.
    #[test]
    fn numbers_hold_under_every_dispatch() {
        unveil_testkit::under_every_dispatch(&["layers::attention::tests::two_parts_equal_one_softmax"]);
    }
}
