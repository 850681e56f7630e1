//! Shapes for tests.

use crate::shape::{ModelShape, ParameterShape, VisionShape};

/// Returns the shape of Qwen2.5-VL-7B, written down from its published `config.json` and index of tensors.
pub(crate) fn shape_7b() -> ModelShape {
    decoder_2_5((3584, 28, 28, 4, 18_944), 152_064, false)
}

/// Returns the shape of Qwen2.5-VL-3B.
pub(crate) fn shape_3b() -> ModelShape {
    decoder_2_5((2048, 36, 16, 2, 11_008), 151_936, true)
}

/// Returns the shape of Qwen2.5-VL-32B.
pub(crate) fn shape_32b() -> ModelShape {
    decoder_2_5((5120, 64, 40, 8, 27_648), 152_064, false)
}

fn decoder_2_5(
    (hidden, layers, heads, kv_heads, intermediate): (u64, u64, u64, u64, u64),
    vocab: u64,
    tied: bool,
) -> ModelShape {
    let head_dim = 128;
    let tower = 1280;
    let tower_mlp = if hidden == 5120 { 3456 } else { 3420 };
    let mut parameters = Vec::new();
    let mut push =
        |name: String, dimensions: &[u64]| parameters.push(ParameterShape { name, dimensions: dimensions.to_vec() });
    push("visual.patch_embed.proj.weight".into(), &[tower, 3, 2, 14, 14]);
    for b in 0..32 {
        let mut linear = |name: &str, rows: u64, columns: u64| {
            push(format!("visual.blocks.{b}.{name}.weight"), &[rows, columns]);
            push(format!("visual.blocks.{b}.{name}.bias"), &[rows]);
        };
        linear("attn.qkv", 3 * tower, tower);
        linear("attn.proj", tower, tower);
        linear("mlp.gate_proj", tower_mlp, tower);
        linear("mlp.up_proj", tower_mlp, tower);
        linear("mlp.down_proj", tower, tower_mlp);
        push(format!("visual.blocks.{b}.norm1.weight"), &[tower]);
        push(format!("visual.blocks.{b}.norm2.weight"), &[tower]);
    }
    push("visual.merger.ln_q.weight".into(), &[tower]);
    for (name, rows) in [("mlp.0", 4 * tower), ("mlp.2", hidden)] {
        push(format!("visual.merger.{name}.weight"), &[rows, 4 * tower]);
        push(format!("visual.merger.{name}.bias"), &[rows]);
    }
    push("model.embed_tokens.weight".into(), &[vocab, hidden]);
    for l in 0..layers {
        let mut matrix = |name: &str, rows: u64, columns: u64| {
            push(format!("model.layers.{l}.{name}.weight"), &[rows, columns]);
        };
        matrix("self_attn.q_proj", heads * head_dim, hidden);
        matrix("self_attn.k_proj", kv_heads * head_dim, hidden);
        matrix("self_attn.v_proj", kv_heads * head_dim, hidden);
        matrix("self_attn.o_proj", hidden, heads * head_dim);
        matrix("mlp.gate_proj", intermediate, hidden);
        matrix("mlp.up_proj", intermediate, hidden);
        matrix("mlp.down_proj", hidden, intermediate);
        for (name, rows) in [("q", heads), ("k", kv_heads), ("v", kv_heads)] {
            push(format!("model.layers.{l}.self_attn.{name}_proj.bias"), &[rows * head_dim]);
        }
        push(format!("model.layers.{l}.input_layernorm.weight"), &[hidden]);
        push(format!("model.layers.{l}.post_attention_layernorm.weight"), &[hidden]);
    }
    push("model.norm.weight".into(), &[hidden]);
    if !tied {
        push("lm_head.weight".into(), &[vocab, hidden]);
    }
    ModelShape {
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        vocab,
        vision: VisionShape {
            depth: 32,
            hidden: tower,
            intermediate: tower_mlp,
            gated: true,
            patch_values: 3 * 2 * 14 * 14,
            patches_per_token: 4,
            pixels_per_token: 28 * 28,
            deepstack: 0,
        },
        parameters,
    }
}
