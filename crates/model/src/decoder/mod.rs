//! The decoder of all families: grouped-query attention with multimodal rotary positions, RMS norms, gated MLP. It runs over whole
//! sequences (with any mask), returns keys and values for generation, and decodes one token per response behind shared prefixes.
//! Differences between families are data: biases and norms of queries and keys, the order of rotary frequencies, and features that are
//! added in the first layers. Its input is embeddings, not token ids.

mod cpu_decode;
pub(crate) mod logprob;

use std::rc::Rc;

use tch::{Kind, Tensor};
use unveil_core::Compute;

use crate::compute::{attention_operands, cache_kind, rounded_operand};
use crate::config::parameters::GetTensor;
use crate::generation::cache::GroupCache;
use crate::generation::decode_slots::StepTensors;
use crate::layers::attention::{Capture, attend_with_lse, capture_rows, merge_by_lse};
use crate::layers::linear::{FusedLinear, Linear};
use crate::layers::ops::{rms_norm, rotate, sdpa, split2};
use crate::layers::rope::Rotary;
use crate::training::packed_attention::PackedAttention;
use crate::training::tape::{Tape, Var};
use crate::{Result, TextConfig};

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub norm1: Tensor,
    pub qkv: FusedLinear,
    /// Norms of queries and keys over the head.
    pub qk_norm: Option<(Tensor, Tensor)>,
    pub o: Linear,
    pub norm2: Tensor,
    pub gate_up: FusedLinear,
    pub down: Linear,
}

/// Rotated queries and keys, and values, of one layer: `[B, heads, L, d]`.
struct Qkv {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// The stack of layers. Its tensors are shared with the model's parameter list.
#[derive(Debug)]
pub(crate) struct Decoder {
    pub config: TextConfig,
    pub layers: Vec<Layer>,
    pub norm: Tensor,
    pub rotary: Rotary,
    /// Precision of attention; that of products belongs to the layers.
    pub compute: Compute,
}

/// The positions that each position may attend to.
pub(crate) enum AttentionMask {
    /// Itself and all earlier positions.
    Causal,
    /// An additive mask `[B or 1, 1, L, L]` in the dtype of the embeddings.
    Additive(Tensor),
    /// The attention of packed groups.
    Packed(PackedAttention),
}

/// Options of a pass over sequences.
#[derive(Default)]
pub(crate) struct SequenceOptions {
    /// Attention to capture.
    pub capture: Option<Rc<Capture>>,
    /// DeepStack: positions in `B * L` `[V]` and, for each of the first layers, features `[V, D]` to add there after the layer.
    pub deepstack: Option<(Tensor, Vec<Var>)>,
    /// Return hidden states of these positions only, `[M]` into `B * L`; the last layer skips the others.
    pub rows: Option<Tensor>,
    /// Return keys and values.
    pub keep_kv: bool,
}

/// Inputs of a pass that all layers share.
struct SequencePass {
    cos: Tensor,
    sin: Tensor,
    mask: AttentionMask,
    options: SequenceOptions,
}

impl SequencePass {
    fn captures(&self, layer: usize) -> bool {
        self.options.capture.as_ref().is_some_and(|c| c.set.captures(layer))
    }
}

/// Result of a pass over sequences.
pub(crate) struct SequenceOut {
    /// `[B, L, D]`, or `[M, D]` if rows were given.
    pub hidden: Var,
    /// Captured attention rows `[B, Q, V]` of each captured layer.
    pub attention: Vec<Var>,
    /// Keys and values `[B, Hkv, L, d]` of each layer; empty unless `keep_kv` is set.
    pub kv: Vec<(Tensor, Tensor)>,
}

impl Decoder {
    /// `get` returns a parameter by name, `fused` the fused tensor that begins with the named parameter, if there is one.
    pub(crate) fn new(
        config: &TextConfig,
        get: &GetTensor<'_>,
        fused: &dyn Fn(&str) -> Option<Tensor>,
    ) -> Result<Self> {
        let layer = |l: usize| -> Result<Layer> {
            let tensor = |name: &str| get(&format!("model.layers.{l}.{name}"));
            let fused_linear = |block: &str, names: &[&str], biased: bool| -> Result<FusedLinear> {
                let full_name = |name: &str| format!("model.layers.{l}.{block}.{name}_proj");
                let parts = names.iter().map(|n| Linear::new(get, full_name(n), biased)).collect::<Result<Vec<_>>>()?;
                let fused = |kind: &str| fused(&format!("{}.{kind}", full_name(names[0])));
                let fused = fused("weight").map(|w| (w, if biased { fused("bias") } else { None }));
                Ok(FusedLinear::new(parts, fused))
            };
            let linear = |name: &str| Linear::new(get, format!("model.layers.{l}.{name}"), false);
            let norms =
                || -> Result<_> { Ok((tensor("self_attn.q_norm.weight")?, tensor("self_attn.k_norm.weight")?)) };
            Ok(Layer {
                norm1: tensor("input_layernorm.weight")?,
                qkv: fused_linear("self_attn", &["q", "k", "v"], config.qkv_bias)?,
                qk_norm: config.qk_norm.then(norms).transpose()?,
                o: linear("self_attn.o_proj")?,
                norm2: tensor("post_attention_layernorm.weight")?,
                gate_up: fused_linear("mlp", &["gate", "up"], false)?,
                down: linear("mlp.down_proj")?,
            })
        };
        let norm = get("model.norm.weight")?;
        Ok(Self {
            config: config.clone(),
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<Vec<_>>>()?,
            rotary: Rotary::new(config, norm.device()),
            norm,
            compute: Compute::default(),
        })
    }

    /// Returns all linear layers, in order.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|l| {
            let attention = l.qkv.parts.iter().chain(std::iter::once(&l.o));
            attention.chain(&l.gate_up.parts).chain(std::iter::once(&l.down))
        })
    }

    /// Runs embeddings `[B, L, D]` at positions `[3, B, L]` through all layers, each a segment of the tape.
    pub(crate) fn run_sequences<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        embeds: Var,
        positions: &Tensor,
        mask: AttentionMask,
        options: SequenceOptions,
    ) -> SequenceOut {
        let (cos, sin) = self.rotary.tables(positions);
        let pass = Rc::new(SequencePass { cos: cos.unsqueeze(2), sin: sin.unsqueeze(2), mask, options });
        let mut x = embeds;
        let mut out = SequenceOut { hidden: Var::constant(Tensor::new()), attention: Vec::new(), kv: Vec::new() };
        for index in 0..self.layers.len() {
            let level = pass.options.deepstack.as_ref().and_then(|(_, levels)| levels.get(index));
            let inputs: Vec<&Var> = std::iter::once(&x).chain(level).collect();
            let shared = pass.clone();
            let mut outputs =
                tape.call_layer(index, &inputs, move |t| self.forward_layer(index, &shared, &t[0], t.get(1)));
            if pass.options.keep_kv {
                let v = outputs.pop().map(|v| v.tensor);
                out.kv.extend(outputs.pop().map(|k| k.tensor).zip(v));
            }
            if pass.captures(index) {
                out.attention.extend(outputs.pop());
            }
            x = outputs.remove(0);
        }
        let has_rows = pass.options.rows.is_some();
        out.hidden = tape.call1(&[&x], move |t| {
            let hidden = rms_norm(&t[0], &self.norm, self.config.rms_norm_eps);
            if has_rows { hidden.squeeze_dim(0) } else { hidden }
        });
        out
    }

    /// Runs one layer over sequences. Returns its output, its attention rows if it is captured, and keys and values if they are kept.
    fn forward_layer(&self, index: usize, pass: &SequencePass, x: &Tensor, level: Option<&Tensor>) -> Vec<Tensor> {
        let layer = &self.layers[index];
        let options = &pass.options;
        let Qkv { q, k, v } = self.qkv(layer, x, &pass.cos, &pass.sin);
        let capture = options.capture.as_deref().filter(|_| pass.captures(index));
        let captured = capture.map(|capture| capture_rows(index, &q, &k, capture));
        let mut attended = match &pass.mask {
            AttentionMask::Causal => sdpa(&q, &k, &v, None, true, self.compute).transpose(1, 2),
            AttentionMask::Additive(mask) => sdpa(&q, &k, &v, Some(mask), false, self.compute).transpose(1, 2),
            AttentionMask::Packed(packed) => packed.attend(&q, &k, &v, attention_operands(self.compute, &q)),
        };
        let rows = options.rows.as_ref().filter(|_| index + 1 == self.layers.len());
        let mut x = x.shallow_clone();
        if let Some(rows) = rows.filter(|_| level.is_none()) {
            (x, attended) = (pick_rows(&x, rows), pick_rows(&attended.flatten(2, 3), rows));
        }
        x = self.finish_layer(layer, &x, &attended);
        if let Some((level, (at, _))) = level.zip(options.deepstack.as_ref()) {
            let flat = x.reshape([-1, self.config.hidden_size]);
            x = flat.index_add(0, at, level).view_as(&x);
            if let Some(rows) = rows {
                x = pick_rows(&x, rows);
            }
        }
        let mut out = vec![x];
        out.extend(captured);
        if options.keep_kv {
            let kind = cache_kind(self.compute, k.kind());
            out.extend([k, v].map(|t| t.to_kind(kind).contiguous()));
        }
        out
    }

    /// Decodes one token per fed row `[A, D]` and appends its keys and values to the KV cache. Returns hidden states `[A, D]` and, if the
    /// cache captures, attention rows `[A, V]`.
    pub(crate) fn step(&self, embeds: &Tensor, cache: &GroupCache, step: &StepTensors) -> (Tensor, Option<Tensor>) {
        let half = self.config.head_dim / 2;
        let (cos, sin) = self.rotary.text_tables(&step.positions);
        let cos = cos.view([-1, 1, 1, half]);
        let sin = sin.view([-1, 1, 1, half]);
        let mut x = embeds.unsqueeze(1);
        let mut attention: Option<Tensor> = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let Qkv { q, k, v } = self.qkv(layer, &x, &cos, &sin);
            cache.write(index, step, &k, &v);
            let (attended, rows) = self.group_attention(&q, cache, index, step);
            if let Some(rows) = rows {
                attention = Some(attention.map_or_else(|| rows.shallow_clone(), |sum| sum + &rows));
            }
            x = self.finish_layer(layer, &x, &attended);
        }
        (rms_norm(&x, &self.norm, self.config.rms_norm_eps).squeeze_dim(1), attention)
    }

    /// Computes attention of one query per fed row `[A, Hq, 1, d]` over the shared prefix of its group and the row's own suffix. The prefix
    /// is read once per group: the responses of a group are query positions against it (Hydragen, arXiv 2402.05099).
    fn group_attention(
        &self,
        q: &Tensor,
        cache: &GroupCache,
        layer: usize,
        step: &StepTensors,
    ) -> (Tensor, Option<Tensor>) {
        let c = &self.config;
        let hkv = c.num_key_value_heads;
        let d = c.head_dim;
        let heads = c.num_attention_heads / c.num_key_value_heads;
        let rows = cache.rows() as i64;
        let n = cache.n() as i64;
        let groups = rows / n;
        let store = cache.layer(layer);
        // Queries are [R, Hkv, heads, d] against suffixes, [S, Hkv, n*heads, d] against prefixes.
        let fed = q.reshape([-1, hkv, heads, d]);
        let by_row = match &step.rows {
            None => fed,
            Some(index) => Tensor::zeros([rows, hkv, heads, d], (Kind::Float, fed.device())).index_copy(0, index, &fed),
        };
        let by_group = by_row.view([groups, n, hkv, heads, d]).transpose(1, 2).reshape([groups, hkv, n * heads, d]);
        let to_rows = |t: &Tensor, last: &[i64]| {
            let size = [&[groups, hkv, n, heads], last].concat();
            t.view(size.as_slice()).transpose(1, 2).reshape([&[rows, hkv, heads], last].concat().as_slice())
        };
        let fed_rows = |t: Tensor| match &step.rows {
            None => t,
            Some(index) => t.index_select(0, index),
        };
        let captured = cache.capture().zip(store.captured.as_ref()).map(|(set, captured)| {
            let scores = by_group.matmul(&captured.image_k.to_kind(by_group.kind()).transpose(-1, -2));
            let v = scores.size()[3];
            let scores = scores.view([groups, hkv, n, heads, v]);
            let image_rows = match &captured.heads {
                // The order of the heads does not matter if all are captured, so nothing is moved.
                None => set.grouped_layer_rows(&scores, cache.image_valid.as_ref(), d),
                Some(_) => {
                    let by_head = scores.transpose(2, 3).reshape([groups, hkv * heads, n, v]);
                    set.layer_rows(&by_head, captured.heads.as_ref(), cache.image_valid.as_ref(), d)
                }
            };
            fed_rows(image_rows.reshape([rows, v]))
        });
        let (prefix, lse) = attend_with_lse(&by_group, &store.prefix_k, &store.prefix_v, cache.prefix_bias.as_ref());
        let prefix = (to_rows(&prefix.contiguous(), &[d]), to_rows(&lse.contiguous(), &[]));
        let suffix_k = store.suffix_k.narrow(2, 0, step.used);
        let suffix_v = store.suffix_v.narrow(2, 0, step.used);
        let suffix = attend_with_lse(&by_row, &suffix_k, &suffix_v, step.suffix_bias.as_ref());
        (fed_rows(merge_by_lse(prefix, suffix)).reshape([-1, 1, hkv * heads, d]), captured)
    }

    fn qkv(&self, layer: &Layer, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Qkv {
        let c = &self.config;
        let hq = c.num_attention_heads;
        let hkv = c.num_key_value_heads;
        let d = c.head_dim;
        let normed = rms_norm(x, &layer.norm1, c.rms_norm_eps);
        let size = x.size();
        let all = layer.qkv.apply(&normed).view([size[0], size[1], hq + 2 * hkv, d]);
        let (qk, v) = split2(&all, 2, hq + hkv, hkv);
        let qk = match &layer.qk_norm {
            None => qk,
            Some((for_q, for_k)) => {
                let (q, k) = split2(&qk, 2, hq, hkv);
                let q = rms_norm(&q, for_q, c.rms_norm_eps);
                let k = rms_norm(&k, for_k, c.rms_norm_eps);
                Tensor::cat(&[q, k], 2)
            }
        };
        // Queries and keys are rotated together. What is rounded here is what caches hold, so that generation and training agree.
        let rotated = rounded_operand(self.compute, rotate(&qk, cos, sin));
        let v = rounded_operand(self.compute, v);
        let (q, k) = split2(&rotated, 2, hq, hkv);
        Qkv { q: q.transpose(1, 2), k: k.transpose(1, 2), v: v.transpose(1, 2) }
    }

    /// Runs the rest of a layer after attention `[B, L, Hq, d]`: output projection, residual, MLP, residual.
    fn finish_layer(&self, layer: &Layer, x: &Tensor, attended: &Tensor) -> Tensor {
        let size = x.size();
        let x = x + layer.o.apply(&attended.reshape([size[0], size[1], -1]));
        let normed = rms_norm(&x, &layer.norm2, self.config.rms_norm_eps);
        let width = self.config.intermediate_size;
        let (gate, up) = split2(&layer.gate_up.apply(&normed), -1, width, width);
        let gated = gate.silu() * up;
        x + layer.down.apply(&gated)
    }
}

/// Returns rows `index [M]` of `x [B, L, D]` as `[1, M, D]`.
fn pick_rows(x: &Tensor, index: &Tensor) -> Tensor {
    let d = x.size()[x.dim() - 1];
    x.reshape([-1, d]).index_select(0, index).unsqueeze(0)
}
