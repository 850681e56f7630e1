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
    /// Learned positions.
    Positions,
}

/// One tensor.
#[derive(Debug, Clone)]
pub(crate) struct TensorSpec {
    pub name: String,
    pub shape: Vec<i64>,
    pub fill: Fill,
}

/// A list of tensors while it grows.
#[derive(Default)]
pub(crate) struct Specs {
    pub list: Vec<TensorSpec>,
}

impl Specs {
    pub(crate) fn push(&mut self, name: impl Into<String>, shape: &[i64], fill: Fill) {
        self.list.push(TensorSpec { name: name.into(), shape: shape.to_vec(), fill });
    }

    /// A matrix (or kernel) and its bias.
    pub(crate) fn linear<const N: usize>(
        &mut self,
        name: impl std::fmt::Display,
        shape: [i64; N],
        weight: Fill,
        bias: Fill,
    ) {
        self.push(format!("{name}.weight"), &shape, weight);
        self.push(format!("{name}.bias"), &shape[..1], bias);
    }

    /// A layer norm.
    pub(crate) fn norm(&mut self, name: impl std::fmt::Display, width: i64) {
        self.push(format!("{name}.weight"), &[width], Fill::Ones);
        self.push(format!("{name}.bias"), &[width], Fill::Zeros);
    }
}

/// All tensors of a model in stable order.
pub(crate) fn tensors(config: &VlmConfig) -> Vec<TensorSpec> {
    let mut out = Specs { list: config.family.vision_tensors(&config.vision) };
    let t = &config.text;
    let (d, i, hd) = (t.hidden_size, t.intermediate_size, t.head_dim);
    let (q, kv) = (t.num_attention_heads * hd, t.num_key_value_heads * hd);
    out.push("model.embed_tokens.weight", &[t.vocab_size, d], Fill::Embedding);
    for l in 0..t.num_hidden_layers {
        let p = format!("model.layers.{l}");
        out.push(format!("{p}.input_layernorm.weight"), &[d], Fill::Ones);
        for (name, rows, bias) in
            [("q_proj", q, Fill::TextQkBias), ("k_proj", kv, Fill::TextQkBias), ("v_proj", kv, Fill::Zeros)]
        {
            out.push(format!("{p}.self_attn.{name}.weight"), &[rows, d], Fill::Linear);
            if t.qkv_bias {
                out.push(format!("{p}.self_attn.{name}.bias"), &[rows], bias);
            }
        }
        if t.qk_norm {
            out.push(format!("{p}.self_attn.q_norm.weight"), &[hd], Fill::Ones);
            out.push(format!("{p}.self_attn.k_norm.weight"), &[hd], Fill::Ones);
        }
        out.push(format!("{p}.self_attn.o_proj.weight"), &[d, q], Fill::Residual(t.num_hidden_layers));
        out.push(format!("{p}.post_attention_layernorm.weight"), &[d], Fill::Ones);
        out.push(format!("{p}.mlp.gate_proj.weight"), &[i, d], Fill::Linear);
        out.push(format!("{p}.mlp.up_proj.weight"), &[i, d], Fill::Linear);
        out.push(format!("{p}.mlp.down_proj.weight"), &[d, i], Fill::Residual(t.num_hidden_layers));
    }
    out.push("model.norm.weight", &[d], Fill::Ones);
    if !config.tie_word_embeddings {
        out.push("lm_head.weight", &[t.vocab_size, d], Fill::Embedding);
    }
    out.list
}

/// The name that a tensor has here: transformers' in-memory names (`model.language_model.…`,
/// `model.visual.…`) and older ones (`language_model.model.…`) mean the same tensors.
pub fn own_name(name: &str) -> String {
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

/// What transformers calls a parameter in memory: the reverse of [`own_name`].
pub(crate) fn memory_name(name: &str) -> String {
    match (name.strip_prefix("model."), name.strip_prefix("visual.")) {
        (Some(rest), _) => format!("model.language_model.{rest}"),
        (_, Some(rest)) => format!("model.visual.{rest}"),
        _ => name.to_owned(),
    }
}

/// Tensors that older files carry and that are computed instead: rotary tables.
pub(crate) fn ignorable(name: &str) -> bool {
    name.ends_with(".inv_freq")
}
