//! The decoder: grouped-query attention under multimodal rotary positions, RMS norms, gated MLP. Runs over whole
//! sequences (any mask), returns keys and values for generation, and runs one token per response behind shared
//! prefixes. Knows embeddings only, no token ids and no images.

use tch::{Kind, Tensor};

use crate::attention::{Capture, capture_rows, rows_of_scores};
use crate::cache::GroupCache;
use crate::ops::{linear, rms_norm, rotate, sdpa, split2};
use crate::rope::Rotary;
use crate::{Result, TextConfig};

struct Layer {
    norm1: Tensor,
    q: (Tensor, Tensor),
    k: (Tensor, Tensor),
    v: (Tensor, Tensor),
    o: Tensor,
    norm2: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

/// Queries, keys and values of one layer, rotated: `[B, heads, L, d]`.
struct Qkv {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// The stack of layers; shares its tensors with the model's parameter list.
pub(crate) struct Decoder {
    config: TextConfig,
    layers: Vec<Layer>,
    norm: Tensor,
    rotary: Rotary,
}

/// What a pass over sequences is asked for besides hidden states.
#[derive(Default)]
pub(crate) struct SequenceAsk<'a> {
    pub capture: Option<&'a Capture>,
    /// Hidden states of these positions only, `[M]` into `B * L`; the last layer skips the others.
    pub rows: Option<&'a Tensor>,
    /// Return keys and values.
    pub keep_kv: bool,
}

/// Result of a pass over sequences.
pub(crate) struct SequenceOut {
    /// `[B, L, D]`, or `[M, D]` where rows were named.
    pub hidden: Tensor,
    pub attention: Option<Tensor>,
    /// Per layer (K, V) `[B, Hkv, L, d]`; empty unless asked for.
    pub kv: Vec<(Tensor, Tensor)>,
}

impl Decoder {
    pub(crate) fn new(config: &TextConfig, get: &dyn Fn(&str) -> Result<Tensor>) -> Result<Self> {
        let layer = |l: usize| -> Result<Layer> {
            let at = |name: &str| get(&format!("model.layers.{l}.{name}"));
            let pair = |name: &str| -> Result<(Tensor, Tensor)> {
                Ok((at(&format!("self_attn.{name}.weight"))?, at(&format!("self_attn.{name}.bias"))?))
            };
            Ok(Layer {
                norm1: at("input_layernorm.weight")?,
                q: pair("q_proj")?,
                k: pair("k_proj")?,
                v: pair("v_proj")?,
                o: at("self_attn.o_proj.weight")?,
                norm2: at("post_attention_layernorm.weight")?,
                gate: at("mlp.gate_proj.weight")?,
                up: at("mlp.up_proj.weight")?,
                down: at("mlp.down_proj.weight")?,
            })
        };
        let norm = get("model.norm.weight")?;
        Ok(Self {
            config: config.clone(),
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<Vec<_>>>()?,
            rotary: Rotary::new(config, norm.device()),
            norm,
        })
    }

    /// Embeddings `[B, L, D]` with positions `[3, B, L]` through all layers. `mask` is additive in the embeddings'
    /// kind, `[B or 1, 1, L, L]`; none means causal.
    pub(crate) fn sequences(
        &self,
        embeds: &Tensor,
        positions: &Tensor,
        mask: Option<&Tensor>,
        ask: &SequenceAsk<'_>,
    ) -> SequenceOut {
        let (cos, sin) = self.rotary.tables(positions, embeds.kind());
        let (cos, sin) = (cos.unsqueeze(2), sin.unsqueeze(2));
        let mut x = embeds.shallow_clone();
        let mut out = SequenceOut { hidden: Tensor::new(), attention: None, kv: Vec::new() };
        for (index, layer) in self.layers.iter().enumerate() {
            let Qkv { q, k, v } = self.qkv(layer, &x, &cos, &sin);
            if let Some(capture) = ask.capture.filter(|c| c.layer == index) {
                out.attention = Some(capture_rows(&q, &k, capture));
            }
            let mut attended = sdpa(&q, &k, &v, mask, mask.is_none()).transpose(1, 2);
            if ask.keep_kv {
                out.kv.push((k.contiguous(), v.contiguous()));
            }
            if let Some(rows) = ask.rows.filter(|_| index + 1 == self.layers.len()) {
                let d = self.config.hidden_size;
                attended = attended.reshape([-1, d]).index_select(0, rows).unsqueeze(0);
                x = x.reshape([-1, d]).index_select(0, rows).unsqueeze(0);
            }
            x = self.finish(layer, &x, &attended);
        }
        out.hidden = rms_norm(&x, &self.norm, self.config.rms_norm_eps);
        if ask.rows.is_some() {
            out.hidden = out.hidden.squeeze_dim(0);
        }
        out
    }

    /// One token per row `[R, D]` behind the rows' caches, which take the token's keys and values. Returns the hidden
    /// states `[R, D]` and, for `capture_layer`, rows `[R, V]`.
    pub(crate) fn step(
        &self,
        embeds: &Tensor,
        cache: &mut GroupCache,
        capture_layer: Option<usize>,
    ) -> (Tensor, Option<Tensor>) {
        let positions = cache.positions(embeds.device());
        let (cos, sin) = self.rotary.tables(&positions, embeds.kind());
        let (cos, sin) =
            (cos.view([-1, 1, 1, self.config.head_dim() / 2]), sin.view([-1, 1, 1, self.config.head_dim() / 2]));
        let place = cache.place(embeds.device());
        let mut x = embeds.unsqueeze(1);
        let mut attention = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let Qkv { q, k, v } = self.qkv(layer, &x, &cos, &sin);
            cache.write(index, &place, &k, &v);
            let capture = capture_layer == Some(index);
            let (attended, rows) = self.group_attention(&q, cache, index, &place, capture);
            attention = rows.or(attention);
            x = self.finish(layer, &x, &attended);
        }
        (rms_norm(&x, &self.norm, self.config.rms_norm_eps).squeeze_dim(1), attention)
    }

    /// Attention of one query per row over the group's shared prefix and the row's own suffix, joined by one softmax.
    /// The prefix is read once per group: a group's responses are query positions against it (arXiv 2402.05099).
    fn group_attention(
        &self,
        q: &Tensor,
        cache: &GroupCache,
        layer: usize,
        place: &crate::cache::Place,
        capture: bool,
    ) -> (Tensor, Option<Tensor>) {
        let c = &self.config;
        let (hkv, d) = (c.num_key_value_heads, c.head_dim());
        let (g, n, heads) = (cache.groups() as i64, cache.n() as i64, c.num_attention_heads / c.num_key_value_heads);
        let store = cache.layer(layer);
        let kind = q.kind();
        let scale = (d as f64).powf(-0.5);
        // Rows as [R, Hkv, heads, d] meet their suffix, as [G, Hkv, n*heads, d] their prefix.
        let own = q.reshape([g * n, hkv, heads, d]);
        let to_group =
            |t: &Tensor, last: i64| t.view([g, n, hkv, heads, last]).transpose(1, 2).reshape([g, hkv, n * heads, last]);
        let to_rows =
            |t: &Tensor, last: i64| t.view([g, hkv, n, heads, last]).transpose(1, 2).reshape([g * n, hkv, heads, last]);
        let shared = to_group(&own, d);
        let raw = shared.matmul(&store.prefix_k.transpose(-1, -2));
        let rows = capture.then(|| {
            let v = cache.image_index.size()[1];
            let index = cache.image_index.view([g, 1, 1, v]).expand([g, hkv, n * heads, v], false);
            let scores = if kind == Kind::Float {
                raw.gather(-1, &index, false)
            } else {
                // Scores in the model's kind have lost digits: make them again from the keys at hand.
                let wide = shared.to_kind(Kind::Float).matmul(&store.prefix_k.to_kind(Kind::Float).transpose(-1, -2));
                wide.gather(-1, &index, false)
            };
            let scores = to_rows(&scores, v).reshape([g * n, hkv * heads, v]);
            let valid = cache.image_valid.repeat_interleave_self_int(n, 0, None).view([g * n, 1, v]);
            rows_of_scores(&scores, &valid, d, 1)
        });
        let mut prefix = raw.to_kind(Kind::Float) * scale;
        if let Some(bias) = &cache.prefix_bias {
            prefix += bias;
        }
        let (suffix_k, suffix_v) = (store.suffix_k.narrow(2, 0, place.used), store.suffix_v.narrow(2, 0, place.used));
        let mut suffix = own.matmul(&suffix_k.transpose(-1, -2)).to_kind(Kind::Float) * scale;
        if let Some(bias) = &place.bias {
            suffix += bias;
        }
        let p = store.prefix_k.size()[2];
        let weights = Tensor::cat(&[prefix, to_group(&suffix, place.used)], -1).softmax(-1, Kind::Float).to_kind(kind);
        let (on_prefix, on_suffix) = split2(&weights, -1, p, place.used);
        let from_prefix = to_rows(&on_prefix.matmul(&store.prefix_v), d);
        let from_suffix = to_rows(&on_suffix.contiguous(), place.used).matmul(&suffix_v);
        ((from_prefix + from_suffix).reshape([g * n, 1, hkv * heads, d]), rows)
    }

    fn qkv(&self, layer: &Layer, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Qkv {
        let c = &self.config;
        let (hq, hkv, d) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim());
        let normed = rms_norm(x, &layer.norm1, c.rms_norm_eps);
        // One product and one rotation for queries and keys together.
        let weight = Tensor::cat(&[&layer.q.0, &layer.k.0, &layer.v.0], 0);
        let bias = Tensor::cat(&[&layer.q.1, &layer.k.1, &layer.v.1], 0);
        let size = x.size();
        let all = linear(&normed, &weight, Some(&bias)).view([size[0], size[1], hq + 2 * hkv, d]);
        let (qk, v) = split2(&all, 2, hq + hkv, hkv);
        let (q, k) = split2(&rotate(&qk, cos, sin), 2, hq, hkv);
        Qkv { q: q.transpose(1, 2), k: k.transpose(1, 2), v: v.transpose(1, 2) }
    }

    /// What follows attention `[B, L, Hq, d]`: output projection, residual, MLP, residual.
    fn finish(&self, layer: &Layer, x: &Tensor, attended: &Tensor) -> Tensor {
        let size = x.size();
        let x = x + linear(&attended.reshape([size[0], size[1], -1]), &layer.o, None);
        let normed = rms_norm(&x, &layer.norm2, self.config.rms_norm_eps);
        let gated = linear(&normed, &layer.gate, None).silu() * linear(&normed, &layer.up, None);
        x + linear(&gated, &layer.down, None)
    }
}
