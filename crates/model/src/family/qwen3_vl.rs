//! Qwen3-VL, dense (arXiv 2511.21631). Decoder: norms on queries and keys, an independent head size, interleaved rotary axes. Vision tower:
//! layer norms, plain MLPs, a learned position grid; features of middle blocks are added in the first decoder layers (DeepStack). Source
//! of names and numerics: Hugging Face transformers.

use serde_json::{Map, Value, json};

use super::{linear_with_bias, weight_and_bias};
use crate::Result;
use crate::config::family::Family;
use crate::config::json::{JsonSection, TextDefaults, text_json, vision_json, vision_section, vision_theta};
use crate::config::parameters::{GetTensor, Init, SpecList, TensorSpec};
use crate::config::{VisionAttention, VisionConfig, VlmConfig};
use crate::vision::{Block, Mlp, Norm, PatchMerger, TowerWeights};

const DEFAULTS: TextDefaults = TextDefaults {
    vocab_size: 151936,
    hidden_size: 4096,
    intermediate_size: 22016,
    layers: 32,
    heads: 32,
    kv_heads: 32,
    head_dim: Some(128),
    max_positions: 128_000,
    eps: 1e-6,
    rope_theta: 500_000.0,
    mrope_section: [24, 20, 20],
    mrope_interleaved: true,
    qkv_bias: false,
    qk_norm: true,
};

pub(super) fn parse(root: &Map<String, Value>) -> Result<VlmConfig, String> {
    let text = match root.get("text_config") {
        Some(Value::Object(map)) => JsonSection { map, name: "text_config." },
        _ => return Err("text_config is missing".into()),
    };
    if text.map.get("attention_bias").and_then(Value::as_bool) == Some(true) {
        return Err(format!("{}attention_bias = true is not supported", text.name));
    }
    VlmConfig::from_sections(Family::Qwen3Vl, root, &text, &DEFAULTS, vision_config(&vision_section(root)?)?)
}

fn vision_config(s: &JsonSection<'_>) -> Result<VisionConfig, String> {
    s.expect_str("hidden_act", "gelu_pytorch_tanh")?;
    let depth = s.count("depth", 27)?;
    let positions = s.int("num_position_embeddings", 2304)?;
    if positions < 1 || positions.isqrt().pow(2) != positions {
        return Err(format!("{}num_position_embeddings is {positions}, but must be a square number", s.name));
    }
    let deepstack = s.indexes("deepstack_visual_indexes", &[8, 16, 24])?;
    if deepstack.windows(2).any(|w| w[0] >= w[1]) || deepstack.last().is_some_and(|b| *b >= depth) {
        return Err(format!(
            "{}deepstack_visual_indexes {deepstack:?} must be ascending and below depth ({depth})",
            s.name
        ));
    }
    Ok(VisionConfig {
        depth,
        hidden_size: s.int("hidden_size", 1152)?,
        intermediate_size: s.int("intermediate_size", 4304)?,
        num_heads: s.int("num_heads", 16)?,
        in_channels: s.int("in_channels", 3)?,
        patch_size: s.int_or_equal_list("patch_size", 16)?,
        temporal_patch_size: s.int_or_equal_list("temporal_patch_size", 2)?,
        spatial_merge_size: s.int("spatial_merge_size", 2)?,
        out_hidden_size: s.int("out_hidden_size", 3584)?,
        rope_theta: vision_theta(s),
        initializer_range: s.float("initializer_range", 0.02)?,
        attention: VisionAttention::Whole { positions, deepstack },
    })
}

pub(super) fn config_json(config: &VlmConfig) -> Value {
    let t = &config.text;
    let rope = json!({"mrope_interleaved": true, "mrope_section": t.mrope_section, "rope_type": "default"});
    let text = text_json(config, rope, &[("attention_bias", json!(false)), ("head_dim", json!(t.head_dim))]);
    let more = match &config.vision.attention {
        VisionAttention::Whole { positions, deepstack } => {
            vec![("deepstack_visual_indexes", json!(deepstack)), ("num_position_embeddings", json!(positions))]
        }
        VisionAttention::Windows { .. } => Vec::new(),
    };
    config.to_json("Qwen3VLForConditionalGeneration", text, vision_json(config, "gelu_pytorch_tanh", &more))
}

pub(super) fn vision_tensors(v: &VisionConfig) -> Vec<TensorSpec> {
    let d = v.hidden_size;
    let i = v.intermediate_size;
    let mut out = SpecList::default();
    out.linear(
        "visual.patch_embed.proj",
        [d, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size],
        Init::Linear,
        Init::Zeros,
    );
    if let VisionAttention::Whole { positions, .. } = &v.attention {
        out.push("visual.pos_embed.weight", &[*positions, d], Init::Positions);
    }
    for b in 0..v.depth {
        let p = format!("visual.blocks.{b}");
        out.norm(format!("{p}.norm1"), d);
        out.linear(format!("{p}.attn.qkv"), [3 * d, d], Init::Linear, Init::VisionQkvBias);
        out.linear(format!("{p}.attn.proj"), [d, d], Init::Residual(v.depth), Init::Zeros);
        out.norm(format!("{p}.norm2"), d);
        out.linear(format!("{p}.mlp.linear_fc1"), [i, d], Init::Linear, Init::Zeros);
        out.linear(format!("{p}.mlp.linear_fc2"), [d, i], Init::Residual(v.depth), Init::Zeros);
    }
    let cell_width = d * v.merge_unit();
    let mut merger = |name: String, normed: i64| {
        out.norm(format!("{name}.norm"), normed);
        out.linear(format!("{name}.linear_fc1"), [cell_width, cell_width], Init::Linear, Init::Zeros);
        out.linear(format!("{name}.linear_fc2"), [v.out_hidden_size, cell_width], Init::Linear, Init::Zeros);
    };
    merger("visual.merger".into(), d);
    for k in 0..v.deepstack().len() {
        merger(format!("visual.deepstack_merger_list.{k}"), cell_width);
    }
    out.list
}

pub(super) fn build_tower(config: &VisionConfig, get: &GetTensor<'_>) -> Result<TowerWeights> {
    let norm = |name: String| -> Result<Norm> {
        let (weight, bias) = weight_and_bias(get, &name)?;
        Ok(Norm::Layer(weight, bias))
    };
    let block = |b: usize| -> Result<Block> {
        let linear = |name: &str| linear_with_bias(get, &format!("visual.blocks.{b}.{name}"));
        Ok(Block {
            norm1: norm(format!("visual.blocks.{b}.norm1"))?,
            qkv: linear("attn.qkv")?,
            proj: linear("attn.proj")?,
            norm2: norm(format!("visual.blocks.{b}.norm2"))?,
            mlp: Mlp::Plain { fc1: linear("mlp.linear_fc1")?, fc2: linear("mlp.linear_fc2")? },
            full: true,
        })
    };
    let merger = |name: &str, norm_after_shuffle: bool| -> Result<PatchMerger> {
        Ok(PatchMerger {
            norm: norm(format!("visual.{name}.norm"))?,
            norm_after_shuffle,
            fc1: linear_with_bias(get, &format!("visual.{name}.linear_fc1"))?,
            fc2: linear_with_bias(get, &format!("visual.{name}.linear_fc2"))?,
        })
    };
    let (weight, bias) = weight_and_bias(get, "visual.patch_embed.proj")?;
    let deepstack = config.deepstack().iter().enumerate();
    Ok(TowerWeights {
        patch: (weight, Some(bias)),
        positions: Some(get("visual.pos_embed.weight")?),
        blocks: (0..config.depth).map(block).collect::<Result<_>>()?,
        merger: merger("merger", false)?,
        deepstack: deepstack
            .map(|(k, b)| Ok((*b, merger(&format!("deepstack_merger_list.{k}"), true)?)))
            .collect::<Result<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parameters::transformers_name;

    fn published() -> Map<String, Value> {
        let value = json!({
            "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
            "text_config": {"attention_bias": false, "bos_token_id": 151643, "dtype": "bfloat16", "eos_token_id": 151645,
                "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728,
                "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_attention_heads": 32,
                "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 5000000,
                "rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"},
                "tie_word_embeddings": true, "vocab_size": 151936},
            "tie_word_embeddings": true, "video_token_id": 151656, "vision_end_token_id": 151653, "vision_start_token_id": 151652,
            "vision_config": {"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1024, "in_channels": 3, "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16,
                "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2,
                "temporal_patch_size": 2}
        });
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn published_config_round_trips() {
        let config = VlmConfig::from_json(&published()).expect("parses");
        let t = &config.text;
        assert_eq!((t.head_dim, t.num_attention_heads, t.rope_theta), (128, 32, 5e6));
        assert!(t.qk_norm && !t.qkv_bias && t.mrope_interleaved && config.tie_word_embeddings);
        assert_eq!(config.vision.deepstack(), [5, 11, 17]);
        assert_eq!(config.dtype, tch::Kind::BFloat16);
        let nested = config_json(&config);
        assert_eq!(VlmConfig::from_json(nested.as_object().expect("object")).expect("parses"), config);
        assert_eq!(transformers_name("model.norm.weight"), "model.language_model.norm.weight");
        assert_eq!(transformers_name("visual.pos_embed.weight"), "model.visual.pos_embed.weight");
        assert_eq!(transformers_name("lm_head.weight"), "lm_head.weight");
    }

    #[test]
    fn errors_of_invalid_values_name_the_key() {
        for (section, key, value) in [
            ("vision_config", "num_position_embeddings", json!(2305)),
            ("vision_config", "deepstack_visual_indexes", json!([5, 5])),
            ("vision_config", "deepstack_visual_indexes", json!([24])),
            ("vision_config", "hidden_act", json!("silu")),
            ("text_config", "attention_bias", json!(true)),
            ("text_config", "head_dim", json!(64)),
        ] {
            let mut map = published();
            map[section][key] = value;
            let message = VlmConfig::from_json(&map).expect_err("must fail");
            assert!(message.contains(if key == "head_dim" { "mrope_section" } else { key }), "{message}");
        }
    }
}
