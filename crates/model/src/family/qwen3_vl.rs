//! Qwen3-VL, dense (arXiv 2511.21631). Decoder: norms on queries and keys, an independent head size, interleaved rotary axes. Vision tower:
//! layer norms, plain MLPs, a learned position grid; features of middle blocks are added in the first decoder layers (DeepStack). Source
//! of names and numerics: Hugging Face transformers.

use serde_json::{Map, Value, json};
use unveil_core::Family;

use super::{linear_with_bias, weight_and_bias};
use crate::Result;
use crate::config::json::{
    JsonSection, TextDefaults, VisionDefaults, text_json, vision_config, vision_json, vision_section,
};
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

const VISION_DEFAULTS: VisionDefaults =
    VisionDefaults { depth: 27, hidden_size: 1152, intermediate_size: 4304, patch_size: 16 };

pub(super) fn parse(root: &Map<String, Value>) -> Result<VlmConfig, String> {
    let text = match root.get("text_config") {
        Some(Value::Object(map)) => JsonSection { map, name: "text_config." },
        _ => return Err("text_config is missing".into()),
    };
    if text.map.get("attention_bias").and_then(Value::as_bool) == Some(true) {
        return Err(format!("{}attention_bias = true is not supported", text.name));
    }
    VlmConfig::from_sections(Family::Qwen3Vl, root, &text, &DEFAULTS, parse_vision(&vision_section(root)?)?)
}

fn parse_vision(s: &JsonSection<'_>) -> Result<VisionConfig, String> {
    s.expect_str("hidden_act", "gelu_pytorch_tanh")?;
    let positions = s.int("num_position_embeddings", 2304)?;
    if positions < 1 || positions.isqrt().pow(2) != positions {
        return Err(format!("{}num_position_embeddings is {positions}, but must be a square number", s.name));
    }
    let deepstack = s.indexes("deepstack_visual_indexes", &[8, 16, 24])?;
    let config = vision_config(s, &VISION_DEFAULTS, VisionAttention::Whole { positions, deepstack })?;
    let deepstack = config.deepstack();
    let depth = config.depth;
    if deepstack.windows(2).any(|w| w[0] >= w[1]) || deepstack.last().is_some_and(|b| *b >= depth) {
        return Err(format!(
            "{}deepstack_visual_indexes {deepstack:?} must be ascending and below depth ({depth})",
            s.name
        ));
    }
    Ok(config)
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
