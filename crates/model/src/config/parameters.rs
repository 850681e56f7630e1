//! The tensors that a configuration requires: names, shapes and initialisation, in the stable order that everything else (optimiser
//! state, checkpoints, weight transfer) relies on.

use tch::Tensor;
use unveil_core::Family;

use crate::{Result, VisionConfig, VlmConfig};

/// Initialisation of a tensor, by its role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Init {
    /// Norm weight: 1.
    Ones,
    /// Bias: 0.
    Zeros,
    /// Bias of the vision tower's fused queries, keys and values; the third of the values is 0.
    VisionQkvBias,
    /// Bias of the decoder's queries or keys.
    TextQkBias,
    /// Matrix; the fan-in is the product of all dimensions but the first.
    Linear,
    /// Matrix that writes into the residual stream of a model with this many blocks.
    Residual(usize),
    /// Embedding or output matrix.
    Embedding,
    /// Learned positions.
    Positions,
}

/// Name, shape and initialisation of one tensor.
#[derive(Debug, Clone)]
pub(crate) struct TensorSpec {
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
}

/// The tensors of a family's vision tower.
pub(crate) trait VisionTensors {
    /// Returns the tensors, named `visual.…`, in stable order.
    fn vision_tensors(self, config: &VisionConfig) -> Vec<TensorSpec>;
}

/// A growing list of tensor specifications.
#[derive(Default)]
pub(crate) struct SpecList {
    pub list: Vec<TensorSpec>,
}

impl SpecList {
    pub(crate) fn push(&mut self, name: impl Into<String>, shape: &[i64], init: Init) {
        self.list.push(TensorSpec { name: name.into(), shape: shape.to_vec(), init });
    }

    /// Adds a matrix (or kernel) and its bias.
    pub(crate) fn linear<const N: usize>(
        &mut self,
        name: impl std::fmt::Display,
        shape: [i64; N],
        weight: Init,
        bias: Init,
    ) {
        self.push(format!("{name}.weight"), &shape, weight);
        self.push(format!("{name}.bias"), &shape[..1], bias);
    }

    /// Adds a layer norm.
    pub(crate) fn norm(&mut self, name: impl std::fmt::Display, width: i64) {
        self.push(format!("{name}.weight"), &[width], Init::Ones);
        self.push(format!("{name}.bias"), &[width], Init::Zeros);
    }
}

/// Returns all tensors of a model in stable order.
pub(crate) fn tensor_specs(config: &VlmConfig) -> Vec<TensorSpec> {
    let mut out = SpecList { list: config.family.vision_tensors(&config.vision) };
    let t = &config.text;
    let d = t.hidden_size;
    let i = t.intermediate_size;
    let hd = t.head_dim;
    let q = t.num_attention_heads * hd;
    let kv = t.num_key_value_heads * hd;
    out.push("model.embed_tokens.weight", &[t.vocab_size, d], Init::Embedding);
    for l in 0..t.num_hidden_layers {
        let p = format!("model.layers.{l}");
        out.push(format!("{p}.input_layernorm.weight"), &[d], Init::Ones);
        for (name, rows, bias) in
            [("q_proj", q, Init::TextQkBias), ("k_proj", kv, Init::TextQkBias), ("v_proj", kv, Init::Zeros)]
        {
            out.push(format!("{p}.self_attn.{name}.weight"), &[rows, d], Init::Linear);
            if t.qkv_bias {
                out.push(format!("{p}.self_attn.{name}.bias"), &[rows], bias);
            }
        }
        if t.qk_norm {
            out.push(format!("{p}.self_attn.q_norm.weight"), &[hd], Init::Ones);
            out.push(format!("{p}.self_attn.k_norm.weight"), &[hd], Init::Ones);
        }
        out.push(format!("{p}.self_attn.o_proj.weight"), &[d, q], Init::Residual(t.num_hidden_layers));
        out.push(format!("{p}.post_attention_layernorm.weight"), &[d], Init::Ones);
        out.push(format!("{p}.mlp.gate_proj.weight"), &[i, d], Init::Linear);
        out.push(format!("{p}.mlp.up_proj.weight"), &[i, d], Init::Linear);
        out.push(format!("{p}.mlp.down_proj.weight"), &[d, i], Init::Residual(t.num_hidden_layers));
    }
    out.push("model.norm.weight", &[d], Init::Ones);
    if !config.tie_word_embeddings {
        out.push("lm_head.weight", &[t.vocab_size, d], Init::Embedding);
    }
    out.list
}

/// Returns the name of a tensor in this crate, given that name, the in-memory name of transformers (`model.language_model.…`,
/// `model.visual.…`) or an older one (`language_model.model.…`).
pub fn canonical_name(name: &str) -> String {
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

/// Returns the in-memory name of a parameter in transformers: the inverse of [`canonical_name`].
pub(crate) fn transformers_name(name: &str) -> String {
    match (name.strip_prefix("model."), name.strip_prefix("visual.")) {
        (Some(rest), _) => format!("model.language_model.{rest}"),
        (_, Some(rest)) => format!("model.visual.{rest}"),
        _ => name.to_owned(),
    }
}

/// Returns the name of a parameter in published files of a family.
pub(crate) fn published_name(family: Family, name: &str) -> String {
    match family {
        Family::Qwen2_5Vl => name.to_owned(),
        // The tower is under `model.visual.`, the decoder under `model.language_model.`.
        Family::Qwen3Vl => transformers_name(name),
    }
}

/// Returns whether a tensor of older files is computed instead of loaded (rotary tables).
pub(crate) fn is_computed(name: &str) -> bool {
    name.ends_with(".inv_freq")
}

/// Returns a model's tensor by name.
pub(crate) type GetTensor<'a> = dyn Fn(&str) -> Result<Tensor> + 'a;
