//! The decoder of all families: grouped-query attention under multimodal rotary positions, RMS norms, gated MLP. Runs over
//! whole sequences (any mask), returns keys and values for generation, and runs one token per response behind shared
//! prefixes. What families differ in is data: a bias on queries, keys and values, a norm on queries and keys, the
//! order of rotary frequencies, features that are added to the first layers. Knows embeddings only, no token ids.

use std::rc::Rc;

use tch::{Kind, Tensor};

use crate::attention::{Capture, attend, capture_rows, merge};
use crate::cache::GroupCache;
use crate::family::Get;
use crate::linear::{Fused, Linear};
use crate::ops::{rms_norm, rotate, sdpa, split2};
use crate::place::Place;
use crate::rope::Rotary;
use crate::tape::{Tape, Var};
use crate::tree::Tree;
use crate::{Result, TextConfig};

pub(crate) struct Layer {
    pub norm1: Tensor,
    pub qkv: Fused,
    /// Norms over the head of queries and keys.
    pub qk_norm: Option<(Tensor, Tensor)>,
    pub o: Linear,
    pub norm2: Tensor,
    pub gate_up: Fused,
    pub down: Linear,
}

/// Queries, keys and values of one layer, rotated: `[B, heads, L, d]`.
struct Qkv {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// The stack of layers; shares its tensors with the model's parameter list.
pub(crate) struct Decoder {
    pub config: TextConfig,
    pub layers: Vec<Layer>,
    pub norm: Tensor,
    pub rotary: Rotary,
}

/// What a position may attend to.
pub(crate) enum Reach {
    /// Itself and what came before it.
    Causal,
    /// What an additive mask `[B or 1, 1, L, L]` in the embeddings' kind leaves open.
    Mask(Tensor),
    /// What packed groups have open, in the embeddings' kind.
    Tree(Tree),
}

/// What a pass over sequences is asked for besides hidden states.
#[derive(Default)]
pub(crate) struct SequenceAsk {
    pub capture: Option<Rc<Capture>>,
    /// Positions in `B * L` and, by layer, what is added there after the first layers: `[V]`, `[V, D]` each.
    pub deepstack: Option<(Tensor, Vec<Var>)>,
    /// Hidden states of these positions only, `[M]` into `B * L`; the last layer skips the others.
    pub rows: Option<Tensor>,
    /// Return keys and values.
    pub keep_kv: bool,
}

/// What all layers of a pass see.
struct Pass {
    cos: Tensor,
    sin: Tensor,
    reach: Reach,
    ask: SequenceAsk,
}

impl Pass {
    fn reads(&self, layer: usize) -> bool {
        self.ask.capture.as_ref().is_some_and(|c| c.set.reads(layer))
    }
}

/// Result of a pass over sequences.
pub(crate) struct SequenceOut {
    /// `[B, L, D]`, or `[M, D]` where rows were named.
    pub hidden: Var,
    /// Attention rows `[B, Q, V]` that each layer adds.
    pub attention: Vec<Var>,
    /// Per layer (K, V) `[B, Hkv, L, d]`; empty unless asked for.
    pub kv: Vec<(Tensor, Tensor)>,
}

impl Decoder {
    /// `fused` gives the tensor whose first rows are the named parameter's, if there is one.
    pub(crate) fn new(config: &TextConfig, get: &Get<'_>, fused: &dyn Fn(&str) -> Option<Tensor>) -> Result<Self> {
        let layer = |l: usize| -> Result<Layer> {
            let at = |name: &str| get(&format!("model.layers.{l}.{name}"));
            let join = |what: &str, names: &[&str], biased: bool| -> Result<Fused> {
                let at = |name: &str| format!("model.layers.{l}.{what}.{name}_proj");
                let parts = names.iter().map(|n| Linear::new(get, at(n), biased)).collect::<Result<Vec<_>>>()?;
                let whole = |kind: &str| fused(&format!("{}.{kind}", at(names[0])));
                let joined = whole("weight").map(|w| (w, if biased { whole("bias") } else { None }));
                Ok(Fused::new(parts, joined))
            };
            let plain = |name: &str| Linear::new(get, format!("model.layers.{l}.{name}"), false);
            let norms = || -> Result<_> { Ok((at("self_attn.q_norm.weight")?, at("self_attn.k_norm.weight")?)) };
            Ok(Layer {
                norm1: at("input_layernorm.weight")?,
                qkv: join("self_attn", &["q", "k", "v"], config.qkv_bias)?,
                qk_norm: config.qk_norm.then(norms).transpose()?,
                o: plain("self_attn.o_proj")?,
                norm2: at("post_attention_layernorm.weight")?,
                gate_up: join("mlp", &["gate", "up"], false)?,
                down: plain("mlp.down_proj")?,
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

    /// All linear layers, in order.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(|l| {
            let attention = l.qkv.parts.iter().chain(std::iter::once(&l.o));
            attention.chain(&l.gate_up.parts).chain(std::iter::once(&l.down))
        })
    }

    /// Embeddings `[B, L, D]` with positions `[3, B, L]` through all layers, a segment each.
    pub(crate) fn sequences<'a>(
        &'a self,
        tape: &mut Tape<'a>,
        embeds: Var,
        positions: &Tensor,
        reach: Reach,
        ask: SequenceAsk,
    ) -> SequenceOut {
        let (cos, sin) = self.rotary.tables(positions);
        let pass = Rc::new(Pass { cos: cos.unsqueeze(2), sin: sin.unsqueeze(2), reach, ask });
        let mut x = embeds;
        let mut out = SequenceOut { hidden: Var::constant(Tensor::new()), attention: Vec::new(), kv: Vec::new() };
        for index in 0..self.layers.len() {
            let level = pass.ask.deepstack.as_ref().and_then(|(_, levels)| levels.get(index));
            let inputs: Vec<&Var> = std::iter::once(&x).chain(level).collect();
            let own = pass.clone();
            let mut made = tape.call_layer(index, &inputs, move |t| self.layer_pass(index, &own, &t[0], t.get(1)));
            if pass.ask.keep_kv {
                let v = made.pop().map(|v| v.tensor);
                out.kv.extend(made.pop().map(|k| k.tensor).zip(v));
            }
            if pass.reads(index) {
                out.attention.extend(made.pop());
            }
            x = made.remove(0);
        }
        let picked = pass.ask.rows.is_some();
        out.hidden = tape.call1(&[&x], move |t| {
            let hidden = rms_norm(&t[0], &self.norm, self.config.rms_norm_eps);
            if picked { hidden.squeeze_dim(0) } else { hidden }
        });
        out
    }

    /// One layer over sequences: its output, the attention rows it adds where they are read, keys and values where they are kept.
    fn layer_pass(&self, index: usize, pass: &Pass, x: &Tensor, level: Option<&Tensor>) -> Vec<Tensor> {
        let (layer, ask) = (&self.layers[index], &pass.ask);
        let Qkv { q, k, v } = self.qkv(layer, x, &pass.cos, &pass.sin);
        let capture = ask.capture.as_deref().filter(|_| pass.reads(index));
        let captured = capture.map(|capture| capture_rows(index, &q, &k, capture));
        let mut attended = match &pass.reach {
            Reach::Causal => sdpa(&q, &k, &v, None, true).transpose(1, 2),
            Reach::Mask(mask) => sdpa(&q, &k, &v, Some(mask), false).transpose(1, 2),
            Reach::Tree(tree) => tree.attend(&q, &k, &v),
        };
        let rows = ask.rows.as_ref().filter(|_| index + 1 == self.layers.len());
        let mut x = x.shallow_clone();
        if let Some(rows) = rows.filter(|_| level.is_none()) {
            (x, attended) = (pick_rows(&x, rows), pick_rows(&attended.flatten(2, 3), rows));
        }
        x = self.finish(layer, &x, &attended);
        if let Some((level, (at, _))) = level.zip(ask.deepstack.as_ref()) {
            let flat = x.reshape([-1, self.config.hidden_size]);
            x = flat.index_add(0, at, level).view_as(&x);
            if let Some(rows) = rows {
                x = pick_rows(&x, rows);
            }
        }
        let mut out = vec![x];
        out.extend(captured);
        if ask.keep_kv {
            out.extend([k.contiguous(), v.contiguous()]);
        }
        out
    }

    /// One token per fed row `[A, D]` behind the rows' caches, which take the token's keys and values. Returns the hidden
    /// states `[A, D]` and, where the cache captures, rows `[A, V]`.
    pub(crate) fn step(&self, embeds: &Tensor, cache: &GroupCache, place: &Place) -> (Tensor, Option<Tensor>) {
        let half = self.config.head_dim / 2;
        let (cos, sin) = self.rotary.tables_of_text(&place.positions);
        let (cos, sin) = (cos.view([-1, 1, 1, half]), sin.view([-1, 1, 1, half]));
        let mut x = embeds.unsqueeze(1);
        let mut attention: Option<Tensor> = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let Qkv { q, k, v } = self.qkv(layer, &x, &cos, &sin);
            cache.write(index, place, &k, &v);
            let (attended, rows) = self.group_attention(&q, cache, index, place);
            if let Some(rows) = rows {
                attention = Some(attention.map_or_else(|| rows.shallow_clone(), |sum| sum + &rows));
            }
            x = self.finish(layer, &x, &attended);
        }
        (rms_norm(&x, &self.norm, self.config.rms_norm_eps).squeeze_dim(1), attention)
    }

    /// Attention of one query per fed row `[A, Hq, 1, d]` over the group's shared prefix and the row's own suffix. The prefix
    /// is read once per group: a group's responses are query positions against it (Hydragen, arXiv 2402.05099).
    fn group_attention(&self, q: &Tensor, cache: &GroupCache, layer: usize, place: &Place) -> (Tensor, Option<Tensor>) {
        let c = &self.config;
        let (hkv, d, heads) = (c.num_key_value_heads, c.head_dim, c.num_attention_heads / c.num_key_value_heads);
        let (rows, n) = (cache.rows() as i64, cache.n() as i64);
        let groups = rows / n;
        let store = cache.layer(layer);
        // Rows as [R, Hkv, heads, d] meet their suffix, as [S, Hkv, n*heads, d] their prefix.
        let fed = q.reshape([-1, hkv, heads, d]);
        let own = match &place.rows {
            None => fed,
            Some(index) => Tensor::zeros([rows, hkv, heads, d], (Kind::Float, fed.device())).index_copy(0, index, &fed),
        };
        let shared = own.view([groups, n, hkv, heads, d]).transpose(1, 2).reshape([groups, hkv, n * heads, d]);
        let to_rows = |t: &Tensor, last: &[i64]| {
            let size = [&[groups, hkv, n, heads], last].concat();
            t.view(size.as_slice()).transpose(1, 2).reshape([&[rows, hkv, heads], last].concat().as_slice())
        };
        let back = |t: Tensor| match &place.rows {
            None => t,
            Some(index) => t.index_select(0, index),
        };
        let captured = cache.capture().zip(store.captured.as_ref()).map(|(set, captured)| {
            let scores = shared.matmul(&captured.image_k.transpose(-1, -2));
            let v = scores.size()[3];
            let scores = scores.view([groups, hkv, n, heads, v]);
            let rows_of = match &captured.heads {
                // All heads: their order does not matter, so nothing is moved.
                None => set.all_rows(&scores, cache.image_valid.as_ref(), d),
                Some(_) => {
                    let by_head = scores.transpose(2, 3).reshape([groups, hkv * heads, n, v]);
                    set.rows(&by_head, captured.heads.as_ref(), cache.image_valid.as_ref(), d)
                }
            };
            back(rows_of.reshape([rows, v]))
        });
        let (prefix, lse) = attend(&shared, &store.prefix_k, &store.prefix_v, cache.prefix_bias.as_ref());
        let prefix = (to_rows(&prefix.contiguous(), &[d]), to_rows(&lse.contiguous(), &[]));
        let (suffix_k, suffix_v) = (store.suffix_k.narrow(2, 0, place.used), store.suffix_v.narrow(2, 0, place.used));
        let suffix = attend(&own, &suffix_k, &suffix_v, place.suffix_bias.as_ref());
        (back(merge(prefix, suffix)).reshape([-1, 1, hkv * heads, d]), captured)
    }

    fn qkv(&self, layer: &Layer, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Qkv {
        let c = &self.config;
        let (hq, hkv, d) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let normed = rms_norm(x, &layer.norm1, c.rms_norm_eps);
        let size = x.size();
        let all = layer.qkv.apply(&normed).view([size[0], size[1], hq + 2 * hkv, d]);
        let (qk, v) = split2(&all, 2, hq + hkv, hkv);
        let qk = match &layer.qk_norm {
            None => qk,
            Some((for_q, for_k)) => {
                let (q, k) = split2(&qk, 2, hq, hkv);
                let (q, k) = (rms_norm(&q, for_q, c.rms_norm_eps), rms_norm(&k, for_k, c.rms_norm_eps));
                Tensor::cat(&[q, k], 2)
            }
        };
        // One rotation for queries and keys together.
        let (q, k) = split2(&rotate(&qk, cos, sin), 2, hq, hkv);
        Qkv { q: q.transpose(1, 2), k: k.transpose(1, 2), v: v.transpose(1, 2) }
    }

    /// What follows attention `[B, L, Hq, d]`: output projection, residual, MLP, residual.
    fn finish(&self, layer: &Layer, x: &Tensor, attended: &Tensor) -> Tensor {
        let size = x.size();
        let x = x + layer.o.apply(&attended.reshape([size[0], size[1], -1]));
        let normed = rms_norm(&x, &layer.norm2, self.config.rms_norm_eps);
        let width = self.config.intermediate_size;
        let (gate, up) = split2(&layer.gate_up.apply(&normed), -1, width, width);
        let gated = gate.silu() * up;
        x + layer.down.apply(&gated)
    }
}

/// Rows `index [M]` of `x [B, L, D]` as `[1, M, D]`.
fn pick_rows(x: &Tensor, index: &Tensor) -> Tensor {
    let d = x.size()[x.dim() - 1];
    x.reshape([-1, d]).index_select(0, index).unsqueeze(0)
}
