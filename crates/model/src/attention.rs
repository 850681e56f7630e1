//! Attention: over two parts that are joined afterwards, and what a token looks at among the image tokens.
//!
//! A captured row belongs to one query token: softmax over the image tokens only, in fp32 from post-rotary queries and
//! keys, averaged over a set of (layer, head). It equals eager attention renormalised over the image tokens per head, then
//! averaged.

use tch::{Device, Tensor};

use crate::{ModelError, Result, TextConfig, VlmConfig};

/// Layers and heads whose attention is read; their rows are averaged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AttentionSet {
    /// By ascending layer: the heads, ascending; none = all.
    layers: Vec<(usize, Option<Vec<i64>>)>,
}

impl AttentionSet {
    /// All heads of one layer.
    pub fn layer(layer: usize) -> Self {
        Self { layers: vec![(layer, None)] }
    }

    /// All heads of `layers`, and single heads `[layer, head]`; both counted from 0. A layer that is named whole has all its
    /// heads.
    pub fn new(layers: &[usize], heads: &[[usize; 2]]) -> Self {
        let mut map: std::collections::BTreeMap<usize, Option<Vec<i64>>> = layers.iter().map(|l| (*l, None)).collect();
        for [layer, head] in heads {
            if let Some(list) = map.entry(*layer).or_insert_with(|| Some(Vec::new())) {
                list.push(*head as i64);
            }
        }
        for list in map.values_mut().flatten() {
            list.sort_unstable();
            list.dedup();
        }
        Self { layers: map.into_iter().collect() }
    }

    /// [`AttentionSet::new`], or the model's default layer where nothing is named.
    pub fn configured(config: &VlmConfig, layers: &[usize], heads: &[[usize; 2]]) -> Self {
        if layers.is_empty() && heads.is_empty() {
            return Self::layer(config.default_capture_layer());
        }
        Self::new(layers, heads)
    }

    /// Errors when nothing is named, or a layer or head that the model does not have.
    pub fn check(&self, config: &TextConfig) -> Result<()> {
        let (layers, heads) = (config.num_hidden_layers, config.num_attention_heads);
        if self.layers.is_empty() {
            return Err(ModelError::input("no layer is named whose attention is to be read"));
        }
        for (layer, list) in &self.layers {
            if *layer >= layers {
                return Err(ModelError::input(format!("capture layer {layer} is not among the {layers} layers")));
            }
            if let Some(head) = list.iter().flatten().find(|h| **h >= heads) {
                return Err(ModelError::input(format!("head {head} of layer {layer} is not among the {heads} heads")));
            }
        }
        Ok(())
    }

    /// The layers that are read, and which of their heads; none = all.
    pub fn named(&self) -> &[(usize, Option<Vec<i64>>)] {
        &self.layers
    }

    /// How many layers are read.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Whether a layer is read.
    pub(crate) fn reads(&self, layer: usize) -> bool {
        self.layers.iter().any(|(l, _)| *l == layer)
    }

    /// One over the number of (layer, head) pairs.
    pub(crate) fn share(&self, heads: i64) -> f64 {
        let pairs: i64 = self.layers.iter().map(|(_, list)| list.as_ref().map_or(heads, |l| l.len() as i64)).sum();
        1.0 / pairs.max(1) as f64
    }

    /// The heads of a layer that are read, none = all.
    pub(crate) fn heads(&self, layer: usize, device: Device) -> Option<Tensor> {
        let list = self.layers.iter().find(|(l, _)| *l == layer)?.1.as_ref()?;
        Some(Tensor::from_slice(list).to_device(device))
    }

    /// 1 for each of a layer's `count` heads that is read, 0 for the others; none = all are read.
    pub(crate) fn flags(&self, layer: usize, count: i64) -> Option<Vec<u8>> {
        let list = self.layers.iter().find(|(l, _)| *l == layer)?.1.as_ref()?;
        Some((0..count).map(|head| u8::from(list.contains(&head))).collect())
    }

    /// What one layer adds to the rows: scores `[B, Hq, Q, V]` (unscaled, fp32) over image tokens, softmax over those that
    /// are `valid` (broadcast), summed over the layer's heads and divided by all pairs: `[B, Q, V]`.
    /// `heads` is [`AttentionSet::heads`] of the layer.
    pub(crate) fn rows(
        &self,
        scores: &Tensor,
        heads: Option<&Tensor>,
        valid: Option<&Tensor>,
        head_dim: i64,
    ) -> Tensor {
        let share = self.share(scores.size()[1]);
        let picked = heads.map(|index| scores.index_select(1, index));
        over_images(picked.as_ref().unwrap_or(scores), valid, head_dim, &[1]) * share
    }

    /// The same for all heads of grouped scores `[B, Hkv, Q, heads, V]`; `valid` is `[B, 1, 1, V]`.
    pub(crate) fn all_rows(&self, scores: &Tensor, valid: Option<&Tensor>, head_dim: i64) -> Tensor {
        let size = scores.size();
        let share = self.share(size[1] * size[3]);
        over_images(scores, valid.map(|v| v.unsqueeze(1)).as_ref(), head_dim, &[1, 3]) * share
    }
}

/// Softmax over the image tokens that are valid, summed over `heads`.
fn over_images(scores: &Tensor, valid: Option<&Tensor>, head_dim: i64, heads: &[i64]) -> Tensor {
    image_softmax(scores, valid, head_dim).sum_dim_intlist(heads, false, scores.kind())
}

/// Softmax of unscaled scores over the image tokens that are valid, the last dimension.
fn image_softmax(scores: &Tensor, valid: Option<&Tensor>, head_dim: i64) -> Tensor {
    let (scores, kind) = (scores * (head_dim as f64).powf(-0.5), scores.kind());
    match valid {
        // A sample without an image has no valid token: its row is zero, not uniform.
        Some(valid) => scores.masked_fill(&valid.logical_not(), NEVER).softmax(-1, kind) * valid.to_kind(kind),
        None => scores.softmax(-1, kind),
    }
}

/// What to capture in a teacher-forced pass.
pub struct Capture {
    /// Which layers and heads.
    pub set: AttentionSet,
    /// Sequence positions of the query tokens `[B, Q]`; pad with any valid position.
    pub queries: Tensor,
    /// Sequence positions of the image tokens `[B, V]`; pad with any valid position.
    pub image_index: Tensor,
    /// Which of them are real `[B, V]`, bool.
    pub image_valid: Tensor,
    /// Keep the graph, so that a loss on the rows trains the model.
    pub differentiable: bool,
    /// Rows of every head by itself, `[B, heads, S, V]`, for sets of queries by these weights `[B, S, Q]`; none = averaged over heads.
    pub pool: Option<Tensor>,
}

impl Capture {
    /// The same, sharing its tensors.
    pub(crate) fn share(&self) -> Self {
        Self {
            set: self.set.clone(),
            queries: self.queries.shallow_clone(),
            image_index: self.image_index.shallow_clone(),
            image_valid: self.image_valid.shallow_clone(),
            differentiable: self.differentiable,
            pool: self.pool.as_ref().map(Tensor::shallow_clone),
        }
    }
}

/// What to capture where the positions are known from the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureSpec {
    /// Which layers and heads.
    pub set: AttentionSet,
    /// Keep the graph.
    pub differentiable: bool,
}

const NEVER: f64 = -1e30;

/// What `layer` adds to the rows `[B, Q, V]` of a pass with queries `q [B, Hq, L, d]` and keys `k [B, Hkv, L, d]`; with
/// [`Capture::pool`] its own rows.
pub(crate) fn capture_rows(layer: usize, q: &Tensor, k: &Tensor, capture: &Capture) -> Tensor {
    let (q, k) = if capture.differentiable { (q.shallow_clone(), k.shallow_clone()) } else { (q.detach(), k.detach()) };
    let (qs, ks) = (q.size(), k.size());
    let (b, hq, hkv, d) = (qs[0], qs[1], ks[1], qs[3]);
    let (nq, nv) = (capture.queries.size()[1], capture.image_index.size()[1]);
    let q = pick(&q, &capture.queries).reshape([b, hkv, hq / hkv * nq, d]);
    let k = pick(&k, &capture.image_index);
    let scores = q.matmul(&k.transpose(-1, -2)).view([b, hq, nq, nv]);
    let (heads, valid) = (capture.set.heads(layer, scores.device()), capture.image_valid.view([b, 1, 1, nv]));
    match &capture.pool {
        None => capture.set.rows(&scores, heads.as_ref(), Some(&valid), d),
        Some(pool) => pool.unsqueeze(1).matmul(&image_softmax(&scores, Some(&valid), d)),
    }
}

/// Positions `index [B, N]` of `t [B, H, L, d]`: `[B, H, N, d]`.
pub(crate) fn pick(t: &Tensor, index: &Tensor) -> Tensor {
    let (size, n) = (t.size(), index.size()[1]);
    t.gather(2, &index.view([size[0], 1, n, 1]).expand([size[0], size[1], n, size[3]], false), false)
}

/// Softmax attention of `q [B, H, Q, d]` over `k, v [B, H, K, d]` with an additive `bias` (broadcast to `[B, H, Q, K]`),
/// all fp32, and the log of each row's sum of exponentials `[B, H, Q]`. Two parts joined by
/// [`merge`] equal one softmax over both (Hydragen, arXiv 2402.05099, section 3.1). Not for gradients.
pub(crate) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> (Tensor, Tensor) {
    let (size, keys) = (q.size(), k.size()[2]);
    let full = [size[0], size[1], size[2], keys];
    match q.device() {
        Device::Cuda(_) => {
            let bias = bias.map(|b| b.expand(full, false));
            let (out, lse, _, _) =
                Tensor::internal_scaled_dot_product_efficient_attention(q, k, v, bias, true, 0.0, false, None::<f64>);
            // The kernel pads the rows of its sums to a multiple of its block.
            (out, lse.narrow(2, 0, size[2]))
        }
        _ => Tensor::internal_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, false, bias, None::<f64>),
    }
}

/// Joins two parts of an attention by the logs of their sums: outputs `[.., d]`, sums `[..]`.
pub(crate) fn merge((a, lse_a): (Tensor, Tensor), (b, lse_b): (Tensor, Tensor)) -> Tensor {
    // The weight of the first part is exp(lse_a) / (exp(lse_a) + exp(lse_b)).
    let share = (lse_a - lse_b).sigmoid().unsqueeze(-1);
    b.lerp_tensor(&a, &share)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn two_parts_equal_one_softmax() {
        tch::manual_seed(3);
        for (heads, queries, first, second, d) in [(2, 5, 7, 3, 16), (1, 1, 1, 9, 8), (3, 8, 40, 1, 32)] {
            let r = |n: i64| Tensor::randn([2, heads, n, d], (Kind::Float, Device::Cpu)) * 2.0;
            let (q, k, v) = (r(queries), r(first + second), r(first + second));
            let bias = Tensor::zeros([2, 1, 1, first], (Kind::Float, Device::Cpu));
            let _ = bias.get(1).narrow(2, first / 2, first - first / 2 - first % 2).fill_(f64::NEG_INFINITY);
            let part = |t: &Tensor, a, b| t.narrow(2, a, b);
            let one = attend(&q, &part(&k, 0, first), &part(&v, 0, first), Some(&bias));
            let second = (part(&k, first, second), part(&v, first, second));
            let two = attend(&q, &second.0, &second.1, None);
            let second = second.0.size()[2];
            let whole_bias = Tensor::cat(&[bias, Tensor::zeros([2, 1, 1, second], (Kind::Float, Device::Cpu))], -1);
            let scores = q.matmul(&k.transpose(-1, -2)) * (d as f64).powf(-0.5) + whole_bias;
            let whole = scores.softmax(-1, Kind::Float).matmul(&v);
            let diff = (merge(one, two) - whole).abs().max().double_value(&[]);
            assert!(diff < 1e-5, "{diff}");
        }
    }

    #[test]
    fn sets_name_layers_and_heads() {
        let set = AttentionSet::new(&[3], &[[1, 2], [1, 0], [3, 1], [1, 2]]);
        assert_eq!(set.layers, vec![(1, Some(vec![0, 2])), (3, None)]);
        assert!((set.share(4) - 1.0 / 6.0).abs() < 1e-12);
        assert!(set.reads(1) && set.reads(3) && !set.reads(2));
        // Uniform scores: every row is uniform, and the two layers' parts sum to 1.
        let scores = Tensor::zeros([1, 4, 2, 5], (Kind::Float, Device::Cpu));
        let rows = |layer| set.rows(&scores, set.heads(layer, Device::Cpu).as_ref(), None, 16);
        let sum = rows(1) + rows(3);
        assert!((sum - 0.2).abs().max().double_value(&[]) < 1e-6);
    }
}
