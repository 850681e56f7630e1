//! The sizes of a model, for plans of memory and time.

use unveil_plan::{ModelShape, ParameterShape, VisionShape};

use crate::VlmConfig;
use crate::config::VisionAttention;
use crate::config::parameters::tensor_specs;

impl VlmConfig {
    /// Returns the sizes of the model with all of its parameters.
    pub fn shape(&self) -> ModelShape {
        let size = |v: i64| v.max(0) as u64;
        let t = &self.text;
        let v = &self.vision;
        let side = size(v.patch_size * v.spatial_merge_size);
        let parameter =
            |name: String, shape: &[i64]| ParameterShape { name, dimensions: shape.iter().map(|d| size(*d)).collect() };
        ModelShape {
            layers: t.num_hidden_layers as u64,
            hidden: size(t.hidden_size),
            intermediate: size(t.intermediate_size),
            heads: size(t.num_attention_heads),
            kv_heads: size(t.num_key_value_heads),
            head_dim: size(t.head_dim),
            vocab: size(t.vocab_size),
            vision: VisionShape {
                depth: v.depth as u64,
                hidden: size(v.hidden_size),
                intermediate: size(v.intermediate_size),
                gated: matches!(v.attention, VisionAttention::Windows { .. }),
                patch_values: size(v.patch_len()),
                patches_per_token: size(v.merge_unit()),
                pixels_per_token: side * side,
                deepstack: v.deepstack().len() as u64,
            },
            parameters: tensor_specs(self).into_iter().map(|s| parameter(s.name, &s.shape)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::preset;

    /// Numbers of the published model cards.
    #[test]
    fn shapes_of_published_models() {
        for (family, name, parameters, pixels, deepstack) in [
            ("qwen2_5_vl", "3b", 3_754_622_976, 784, 0),
            ("qwen2_5_vl", "7b", 8_292_166_656, 784, 0),
            ("qwen3_vl", "8b", 8_767_123_696, 1024, 3),
        ] {
            let shape = preset(family, name).unwrap().config().shape();
            assert_eq!(shape.count(|_| true).total(), parameters, "{name}");
            assert_eq!((shape.vision.pixels_per_token, shape.vision.deepstack), (pixels, deepstack), "{name}");
            let targets = ["q_proj".to_owned(), "visual.*.qkv".to_owned()];
            let (adapters, adapted) = shape.count_adapters(&targets, 4);
            assert!(adapters.vision > 0 && adapters.layers > 0 && adapted.outside == 0, "{adapters:?}");
            assert_eq!(adapted.layers, shape.layers * shape.hidden * shape.heads * shape.head_dim);
        }
    }
}
