//! Qwen2.5-VL (arXiv 2502.13923). Decoder: biases on queries, keys and values, one block of rotary frequencies per axis. Vision tower: RMS
//! norms, gated MLPs, window attention. Source of names and numerics: Hugging Face transformers.

use serde_json::{Map, Value, json};
use tch::Tensor;
use unveil_core::Family;

use super::linear_with_bias;
use crate::Result;
use crate::config::json::{
    JsonSection, TextDefaults, VisionDefaults, text_json, vision_config, vision_json, vision_section,
};
use crate::config::parameters::{GetTensor, Init, SpecList, TensorSpec};
use crate::config::{VisionAttention, VisionConfig, VlmConfig};
use crate::vision::{Block, Mlp, Norm, PatchMerger, TowerWeights};

const DEFAULTS: TextDefaults = TextDefaults {
    vocab_size: 152064,
    hidden_size: 8192,
    intermediate_size: 29568,
    layers: 80,
    heads: 64,
    kv_heads: 8,
    head_dim: None,
    max_positions: 32768,
    eps: 1e-5,
    rope_theta: 1_000_000.0,
    mrope_section: [16, 24, 24],
    mrope_interleaved: false,
    qkv_bias: true,
    qk_norm: false,
};

const VISION_DEFAULTS: VisionDefaults =
    VisionDefaults { depth: 32, hidden_size: 3584, intermediate_size: 3420, patch_size: 14 };

pub(super) fn parse(root: &Map<String, Value>) -> Result<VlmConfig, String> {
    // Published checkpoints have the decoder's keys at the top level.
    let text = match root.get("text_config") {
        Some(Value::Object(map)) => JsonSection { map, name: "text_config." },
        None | Some(Value::Null) => JsonSection { map: root, name: "" },
        Some(_) => return Err("text_config is not an object".into()),
    };
    if text.map.get("use_sliding_window").and_then(Value::as_bool) == Some(true) {
        return Err(format!("{}use_sliding_window = true is not supported", text.name));
    }
    VlmConfig::from_sections(Family::Qwen2_5Vl, root, &text, &DEFAULTS, parse_vision(&vision_section(root)?)?)
}

fn parse_vision(s: &JsonSection<'_>) -> Result<VisionConfig, String> {
    s.expect_str("hidden_act", "silu")?;
    let window_size = s.int("window_size", 112)?;
    let attention = VisionAttention::Windows {
        window_size,
        full_attention: s.indexes("fullatt_block_indexes", &[7, 15, 23, 31])?,
        tokens_per_second: s.int("tokens_per_second", 4)?,
    };
    let config = vision_config(s, &VISION_DEFAULTS, attention)?;
    if window_size < config.patch_size * config.spatial_merge_size {
        return Err(format!("{}window_size {window_size} is smaller than one merged cell", s.name));
    }
    Ok(config)
}

pub(super) fn config_json(config: &VlmConfig) -> Value {
    let t = &config.text;
    let rope = json!({"mrope_section": t.mrope_section, "rope_type": "default", "type": "default"});
    let text = text_json(
        config,
        rope,
        &[
            ("layer_types", json!(vec!["full_attention"; t.num_hidden_layers])),
            ("max_window_layers", json!(t.num_hidden_layers)),
            ("sliding_window", Value::Null),
            ("use_sliding_window", json!(false)),
        ],
    );
    let more = match &config.vision.attention {
        VisionAttention::Windows { window_size, full_attention, tokens_per_second } => vec![
            ("fullatt_block_indexes", json!(full_attention)),
            ("tokens_per_second", json!(tokens_per_second)),
            ("window_size", json!(window_size)),
        ],
        VisionAttention::Whole { .. } => Vec::new(),
    };
    config.to_json("Qwen2_5_VLForConditionalGeneration", text, vision_json(config, "silu", &more))
}

pub(super) fn vision_tensors(v: &VisionConfig) -> Vec<TensorSpec> {
    let d = v.hidden_size;
    let i = v.intermediate_size;
    let mut out = SpecList::default();
    out.push(
        "visual.patch_embed.proj.weight",
        &[d, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size],
        Init::Linear,
    );
    for b in 0..v.depth {
        let p = format!("visual.blocks.{b}");
        out.push(format!("{p}.norm1.weight"), &[d], Init::Ones);
        out.linear(format!("{p}.attn.qkv"), [3 * d, d], Init::Linear, Init::VisionQkvBias);
        out.linear(format!("{p}.attn.proj"), [d, d], Init::Residual(v.depth), Init::Zeros);
        out.push(format!("{p}.norm2.weight"), &[d], Init::Ones);
        out.linear(format!("{p}.mlp.gate_proj"), [i, d], Init::Linear, Init::Zeros);
        out.linear(format!("{p}.mlp.up_proj"), [i, d], Init::Linear, Init::Zeros);
        out.linear(format!("{p}.mlp.down_proj"), [d, i], Init::Residual(v.depth), Init::Zeros);
    }
    let cell_width = d * v.merge_unit();
    out.push("visual.merger.ln_q.weight", &[d], Init::Ones);
    out.linear("visual.merger.mlp.0", [cell_width, cell_width], Init::Linear, Init::Zeros);
    out.linear("visual.merger.mlp.2", [v.out_hidden_size, cell_width], Init::Linear, Init::Zeros);
    out.list
}

pub(super) fn build_tower(config: &VisionConfig, get: &GetTensor<'_>) -> Result<TowerWeights> {
    let full = |b: usize| match &config.attention {
        VisionAttention::Windows { full_attention, .. } => full_attention.contains(&b),
        VisionAttention::Whole { .. } => true,
    };
    let rms = |name: &str| -> Result<Norm> { Ok(Norm::Rms(get(&format!("visual.{name}.weight"))?)) };
    let block = |b: usize| -> Result<Block> {
        let linear = |name: &str| linear_with_bias(get, &format!("visual.blocks.{b}.{name}"));
        Ok(Block {
            norm1: rms(&format!("blocks.{b}.norm1"))?,
            qkv: linear("attn.qkv")?,
            proj: linear("attn.proj")?,
            norm2: rms(&format!("blocks.{b}.norm2"))?,
            mlp: Mlp::Gated {
                gate: linear("mlp.gate_proj")?,
                up: linear("mlp.up_proj")?,
                down: linear("mlp.down_proj")?,
            },
            full: full(b),
        })
    };
    Ok(TowerWeights {
        patch: (get("visual.patch_embed.proj.weight")?, None::<Tensor>),
        positions: None,
        blocks: (0..config.depth).map(block).collect::<Result<_>>()?,
        merger: PatchMerger {
            norm: rms("merger.ln_q")?,
            norm_after_shuffle: false,
            fc1: linear_with_bias(get, "visual.merger.mlp.0")?,
            fc2: linear_with_bias(get, "visual.merger.mlp.2")?,
        },
        deepstack: Vec::new(),
    })
}
