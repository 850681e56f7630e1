//! Model families. Decoder, vision tower and everything around them are shared; what a family has of its own stands in
//! one file each: the text of `config.json`, the tensors of its vision tower, their names in files, and how the tower is put together.

mod qwen2_5_vl;
mod qwen3_vl;

use serde_json::{Map, Value};
use tch::Tensor;

use crate::linear::Linear;
use crate::spec::{TensorSpec, memory_name};
use crate::vision::Tower;
use crate::{Result, VisionConfig, VlmConfig};

/// A model family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Qwen2.5-VL (arXiv 2502.13923).
    Qwen2_5Vl,
    /// Qwen3-VL, dense (arXiv 2511.21631).
    Qwen3Vl,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 2] = [Self::Qwen2_5Vl, Self::Qwen3Vl];

    /// `model_type` in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2_5Vl => "qwen2_5_vl",
            Self::Qwen3Vl => "qwen3_vl",
        }
    }

    /// The family of a `model_type`; the error lists those that are known.
    pub fn named(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|f| f.name()).collect();
            format!("model_type `{name}` is not supported, supported: {}", known.join(", "))
        })
    }

    /// Reads the content of `config.json`.
    pub(crate) fn parse(self, root: &Map<String, Value>) -> Result<VlmConfig, String> {
        match self {
            Self::Qwen2_5Vl => qwen2_5_vl::parse(root),
            Self::Qwen3Vl => qwen3_vl::parse(root),
        }
    }

    /// The content of `config.json`, as transformers reads it.
    pub(crate) fn config_json(self, config: &VlmConfig) -> Value {
        match self {
            Self::Qwen2_5Vl => qwen2_5_vl::config_json(config),
            Self::Qwen3Vl => qwen3_vl::config_json(config),
        }
    }

    /// The vision tower's tensors in stable order, named `visual.…`.
    pub(crate) fn vision_tensors(self, config: &VisionConfig) -> Vec<TensorSpec> {
        match self {
            Self::Qwen2_5Vl => qwen2_5_vl::vision_tensors(config),
            Self::Qwen3Vl => qwen3_vl::vision_tensors(config),
        }
    }

    /// Puts the vision tower together.
    pub(crate) fn tower(self, config: &VisionConfig, get: &Get<'_>) -> Result<Tower> {
        match self {
            Self::Qwen2_5Vl => qwen2_5_vl::tower(config, get),
            Self::Qwen3Vl => qwen3_vl::tower(config, get),
        }
    }

    /// How published files of the family spell a parameter's name.
    pub(crate) fn stored_name(self, name: &str) -> String {
        match self {
            Self::Qwen2_5Vl => name.to_owned(),
            // The tower under `model.visual.`, the decoder under `model.language_model.`.
            Self::Qwen3Vl => memory_name(name),
        }
    }
}

/// A model's tensor by name.
pub(crate) type Get<'a> = dyn Fn(&str) -> Result<Tensor> + 'a;

/// The linear layer `NAME`, with a bias.
pub(crate) fn affine(get: &Get<'_>, name: &str) -> Result<Linear> {
    Linear::new(get, name.to_owned(), true)
}

/// `NAME.weight` and `NAME.bias`.
pub(crate) fn pair(get: &Get<'_>, name: &str) -> Result<(Tensor, Tensor)> {
    Ok((get(&format!("{name}.weight"))?, get(&format!("{name}.bias"))?))
}
