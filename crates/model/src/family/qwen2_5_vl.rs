//! Qwen2.5-VL (arXiv 2502.13923): biases on queries, keys and values, one block of rotary frequencies per axis; a tower
//! with RMS norms, gated MLPs and window attention. Source of names and numerics: Hugging Face transformers.

use serde_json::{Map, Value, json};
use tch::Tensor;

use super::{Get, affine};
use crate::Result;
use crate::config::{Reach, VisionConfig, VlmConfig};
use crate::config_json::{Section, TextDefaults, text_json, vision_json, vision_section, vision_theta};
use crate::family::Family;
use crate::spec::{Fill, Specs, TensorSpec};
use crate::vision::{Block, Merger, Mlp, Norm, Tower};

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

pub(super) fn parse(root: &Map<String, Value>) -> Result<VlmConfig, String> {
    // Published checkpoints keep the decoder's keys at the top.
    let text = match root.get("text_config") {
        Some(Value::Object(map)) => Section { map, name: "text_config." },
        None | Some(Value::Null) => Section { map: root, name: "" },
        Some(_) => return Err("text_config is not an object".into()),
    };
    if text.map.get("use_sliding_window").and_then(Value::as_bool) == Some(true) {
        return Err(format!("{}use_sliding_window = true is not supported", text.name));
    }
    VlmConfig::common(Family::Qwen2_5Vl, root, &text, &DEFAULTS, vision_config(&vision_section(root)?)?)
}

fn vision_config(s: &Section<'_>) -> Result<VisionConfig, String> {
    s.expect_str("hidden_act", "silu")?;
    let (patch_size, spatial_merge_size) = (s.square("patch_size", 14)?, s.int("spatial_merge_size", 2)?);
    let window_size = s.int("window_size", 112)?;
    if window_size < patch_size * spatial_merge_size {
        return Err(format!("{}window_size {window_size} is smaller than one merged cell", s.name));
    }
    Ok(VisionConfig {
        depth: s.count("depth", 32)?,
        hidden_size: s.int("hidden_size", 3584)?,
        intermediate_size: s.int("intermediate_size", 3420)?,
        num_heads: s.int("num_heads", 16)?,
        in_channels: s.int("in_channels", 3)?,
        patch_size,
        temporal_patch_size: s.square("temporal_patch_size", 2)?,
        spatial_merge_size,
        out_hidden_size: s.int("out_hidden_size", 3584)?,
        rope_theta: vision_theta(s),
        initializer_range: s.float("initializer_range", 0.02)?,
        reach: Reach::Windows {
            window_size,
            full_attention: s.indexes("fullatt_block_indexes", &[7, 15, 23, 31])?,
            tokens_per_second: s.int("tokens_per_second", 4)?,
        },
    })
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
    let more = match &config.vision.reach {
        Reach::Windows { window_size, full_attention, tokens_per_second } => vec![
            ("fullatt_block_indexes", json!(full_attention)),
            ("tokens_per_second", json!(tokens_per_second)),
            ("window_size", json!(window_size)),
        ],
        Reach::Whole { .. } => Vec::new(),
    };
    config.document("Qwen2_5_VLForConditionalGeneration", text, vision_json(config, "silu", &more))
}

pub(super) fn vision_tensors(v: &VisionConfig) -> Vec<TensorSpec> {
    let (d, i) = (v.hidden_size, v.intermediate_size);
    let mut out = Specs::default();
    out.push(
        "visual.patch_embed.proj.weight",
        &[d, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size],
        Fill::Linear,
    );
    for b in 0..v.depth {
        let p = format!("visual.blocks.{b}");
        out.push(format!("{p}.norm1.weight"), &[d], Fill::Ones);
        out.linear(format!("{p}.attn.qkv"), [3 * d, d], Fill::Linear, Fill::VisionQkvBias);
        out.linear(format!("{p}.attn.proj"), [d, d], Fill::Residual(v.depth), Fill::Zeros);
        out.push(format!("{p}.norm2.weight"), &[d], Fill::Ones);
        out.linear(format!("{p}.mlp.gate_proj"), [i, d], Fill::Linear, Fill::Zeros);
        out.linear(format!("{p}.mlp.up_proj"), [i, d], Fill::Linear, Fill::Zeros);
        out.linear(format!("{p}.mlp.down_proj"), [d, i], Fill::Residual(v.depth), Fill::Zeros);
    }
    let wide = d * v.merge_unit();
    out.push("visual.merger.ln_q.weight", &[d], Fill::Ones);
    out.linear("visual.merger.mlp.0", [wide, wide], Fill::Linear, Fill::Zeros);
    out.linear("visual.merger.mlp.2", [v.out_hidden_size, wide], Fill::Linear, Fill::Zeros);
    out.list
}

pub(super) fn tower(config: &VisionConfig, get: &Get<'_>) -> Result<Tower> {
    let full = |b: usize| match &config.reach {
        Reach::Windows { full_attention, .. } => full_attention.contains(&b),
        Reach::Whole { .. } => true,
    };
    let rms = |name: &str| -> Result<Norm> { Ok(Norm::Rms(get(&format!("visual.{name}.weight"))?)) };
    let block = |b: usize| -> Result<Block> {
        let at = |name: &str| affine(get, &format!("visual.blocks.{b}.{name}"));
        Ok(Block {
            norm1: rms(&format!("blocks.{b}.norm1"))?,
            qkv: at("attn.qkv")?,
            proj: at("attn.proj")?,
            norm2: rms(&format!("blocks.{b}.norm2"))?,
            mlp: Mlp::Gated { gate: at("mlp.gate_proj")?, up: at("mlp.up_proj")?, down: at("mlp.down_proj")? },
            full: full(b),
        })
    };
    Ok(Tower {
        patch: (get("visual.patch_embed.proj.weight")?, None::<Tensor>),
        positions: None,
        blocks: (0..config.depth).map(block).collect::<Result<_>>()?,
        merger: Merger {
            norm: rms("merger.ln_q")?,
            norm_after_shuffle: false,
            fc1: affine(get, "visual.merger.mlp.0")?,
            fc2: affine(get, "visual.merger.mlp.2")?,
        },
        deepstack: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn published() -> Map<String, Value> {
        let value = json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
            "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
            "max_position_embeddings": 128000, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
            "use_sliding_window": false, "vocab_size": 151936,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}
        });
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn flat_layout_of_published_checkpoints() {
        let config = VlmConfig::from_json(&published()).expect("parses");
        assert_eq!(
            (config.text.hidden_size, config.text.head_dim, config.text.mrope_section),
            (2048, 128, [16, 24, 24])
        );
        assert!(config.tie_word_embeddings);
        assert_eq!(config.dtype, Kind::BFloat16);
        assert_eq!(config.default_capture_layer(), 24);
        assert_eq!(config.merged_tokens([1, 8, 12]).expect("fits"), 24);
        assert!(config.merged_tokens([1, 7, 12]).is_err());
    }

    #[test]
    fn writes_what_it_reads() {
        let config = VlmConfig::from_json(&published()).expect("parses");
        let nested = config_json(&config);
        let again = VlmConfig::from_json(nested.as_object().expect("object")).expect("parses");
        assert_eq!(config, again);
    }

    #[test]
    fn impossible_values_name_the_key() {
        for (key, value, word) in [
            ("hidden_size", json!(2050), "hidden_size"),
            ("hidden_act", json!("gelu"), "hidden_act"),
            ("model_type", json!("llava"), "llava"),
            ("num_hidden_layers", json!("many"), "num_hidden_layers"),
            ("rope_scaling", json!({"type": "mrope", "mrope_section": [1, 2, 3]}), "mrope_section"),
            ("rope_scaling", json!({"type": "yarn"}), "yarn"),
        ] {
            let mut map = published();
            map.insert(key.into(), value);
            let message = VlmConfig::from_json(&map).expect_err("must fail");
            assert!(message.contains(word), "{message}");
        }
    }
}
