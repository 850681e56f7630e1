//! Model families. Decoder and vision tower are shared; each family has a file with what is specific to it: the text of `config.json`,
//! the tensors of its vision tower, their names in files, and the assembly of the tower.

mod qwen2_5_vl;
mod qwen3_vl;

use serde_json::{Map, Value};
use tch::Tensor;
use unveil_core::Family;

use crate::config::family::ConfigText;
use crate::config::parameters::{GetTensor, TensorSpec, VisionTensors};
use crate::layers::linear::Linear;
use crate::vision::TowerWeights;
use crate::{Result, VisionConfig, VlmConfig};

impl ConfigText for Family {
    fn parse(self, root: &Map<String, Value>) -> Result<VlmConfig, String> {
        match self {
            Self::Qwen2_5Vl => qwen2_5_vl::parse(root),
            Self::Qwen3Vl => qwen3_vl::parse(root),
        }
    }

    fn config_json(self, config: &VlmConfig) -> Value {
        match self {
            Self::Qwen2_5Vl => qwen2_5_vl::config_json(config),
            Self::Qwen3Vl => qwen3_vl::config_json(config),
        }
    }
}

impl VisionTensors for Family {
    fn vision_tensors(self, config: &VisionConfig) -> Vec<TensorSpec> {
        match self {
            Self::Qwen2_5Vl => qwen2_5_vl::vision_tensors(config),
            Self::Qwen3Vl => qwen3_vl::vision_tensors(config),
        }
    }
}

/// Assembles the vision tower of a family.
pub(crate) fn build_tower(family: Family, config: &VisionConfig, get: &GetTensor<'_>) -> Result<TowerWeights> {
    match family {
        Family::Qwen2_5Vl => qwen2_5_vl::build_tower(config, get),
        Family::Qwen3Vl => qwen3_vl::build_tower(config, get),
    }
}

/// Creates the linear layer `NAME` with a bias.
pub(crate) fn linear_with_bias(get: &GetTensor<'_>, name: &str) -> Result<Linear> {
    Linear::new(get, name.to_owned(), true)
}

/// Returns `NAME.weight` and `NAME.bias`.
pub(crate) fn weight_and_bias(get: &GetTensor<'_>, name: &str) -> Result<(Tensor, Tensor)> {
    Ok((get(&format!("{name}.weight"))?, get(&format!("{name}.bias"))?))
}
