//! Which tensors a configuration calls for: published names, shapes and kind of initialisation, in the stable order
//! that everything else (optimiser state, checkpoints, weight transfer) relies on.

use crate::VlmConfig;

/// What a tensor is, which decides how a fresh one is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Norm weight: 1.
    Ones,
    /// Bias: 0.
    Zeros,
    /// Bias of the vision tower's fused queries, keys and values; the values' third is 0.
    VisionQkvBias,
    /// Bias of the decoder's queries or keys.
    TextQkBias,
    /// Matrix; fan-in is all but the first dimension.
    Linear,
    /// Matrix that writes into the residual stream of this many blocks.
    Residual(usize),
    /// Embedding or output matrix.
    Embedding,
}

/// One tensor.
#[derive(Debug, Clone)]
pub(crate) struct TensorSpec {
    pub name: String,
    pub shape: Vec<i64>,
    pub fill: Fill,
}

/// All tensors of a model in stable order.
pub(crate) fn tensors(config: &VlmConfig) -> Vec<TensorSpec> {
    let mut out = Vec::new();
    let mut push = |name: String, shape: &[i64], fill: Fill| out.push(TensorSpec { name, shape: shape.to_vec(), fill });
    let v = &config.vision;
    let (d, i) = (v.hidden_size, v.intermediate_size);
    push(
        "visual.patch_embed.proj.weight".into(),
        &[d, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size],
        Fill::Linear,
    );
    for b in 0..v.depth {
        let p = format!("visual.blocks.{b}");
        push(format!("{p}.norm1.weight"), &[d], Fill::Ones);
        push(format!("{p}.attn.qkv.weight"), &[3 * d, d], Fill::Linear);
        push(format!("{p}.attn.qkv.bias"), &[3 * d], Fill::VisionQkvBias);
        push(format!("{p}.attn.proj.weight"), &[d, d], Fill::Residual(v.depth));
        push(format!("{p}.attn.proj.bias"), &[d], Fill::Zeros);
        push(format!("{p}.norm2.weight"), &[d], Fill::Ones);
        let mlp = [
            ("gate_proj", i, d, Fill::Linear),
            ("up_proj", i, d, Fill::Linear),
            ("down_proj", d, i, Fill::Residual(v.depth)),
        ];
        for (name, rows, cols, fill) in mlp {
            push(format!("{p}.mlp.{name}.weight"), &[rows, cols], fill);
            push(format!("{p}.mlp.{name}.bias"), &[rows], Fill::Zeros);
        }
    }
    let wide = d * v.merge_unit();
    push("visual.merger.ln_q.weight".into(), &[d], Fill::Ones);
    push("visual.merger.mlp.0.weight".into(), &[wide, wide], Fill::Linear);
    push("visual.merger.mlp.0.bias".into(), &[wide], Fill::Zeros);
    push("visual.merger.mlp.2.weight".into(), &[v.out_hidden_size, wide], Fill::Linear);
    push("visual.merger.mlp.2.bias".into(), &[v.out_hidden_size], Fill::Zeros);

    let t = &config.text;
    let (d, i, kv) = (t.hidden_size, t.intermediate_size, t.num_key_value_heads * t.head_dim());
    push("model.embed_tokens.weight".into(), &[t.vocab_size, d], Fill::Embedding);
    for l in 0..t.num_hidden_layers {
        let p = format!("model.layers.{l}");
        push(format!("{p}.input_layernorm.weight"), &[d], Fill::Ones);
        for (name, rows, bias) in
            [("q_proj", d, Fill::TextQkBias), ("k_proj", kv, Fill::TextQkBias), ("v_proj", kv, Fill::Zeros)]
        {
            push(format!("{p}.self_attn.{name}.weight"), &[rows, d], Fill::Linear);
            push(format!("{p}.self_attn.{name}.bias"), &[rows], bias);
        }
        push(format!("{p}.self_attn.o_proj.weight"), &[d, d], Fill::Residual(t.num_hidden_layers));
        push(format!("{p}.post_attention_layernorm.weight"), &[d], Fill::Ones);
        push(format!("{p}.mlp.gate_proj.weight"), &[i, d], Fill::Linear);
        push(format!("{p}.mlp.up_proj.weight"), &[i, d], Fill::Linear);
        push(format!("{p}.mlp.down_proj.weight"), &[d, i], Fill::Residual(t.num_hidden_layers));
    }
    push("model.norm.weight".into(), &[d], Fill::Ones);
    if !config.tie_word_embeddings {
        push("lm_head.weight".into(), &[t.vocab_size, d], Fill::Embedding);
    }
    out
}

/// The published spelling of a tensor's name: transformers' in-memory names (`model.language_model.…`,
/// `model.visual.…`) and older ones (`language_model.model.…`) mean the same tensors.
pub(crate) fn published_name(name: &str) -> String {
    for (from, to) in
        [("model.language_model.", "model."), ("model.visual.", "visual."), ("language_model.model.", "model.")]
    {
        if let Some(rest) = name.strip_prefix(from) {
            return format!("{to}{rest}");
        }
    }
    match name {
        "model.lm_head.weight" | "language_model.lm_head.weight" => "lm_head.weight".into(),
        _ => name.to_owned(),
    }
}

/// Tensors that older files carry and that are computed instead: rotary tables, and the output matrix where it is
/// the embedding.
pub(crate) fn ignorable(name: &str, tied: bool) -> bool {
    name.ends_with(".inv_freq") || (tied && name == "lm_head.weight")
}
