//! Attention in two parts that are merged by log-sum-exp, and capture of the attention of query tokens over image tokens.
//!
//! A captured row belongs to one query token: a softmax over the image tokens only, in fp32 from post-rotary queries and keys, averaged
//! over a set of (layer, head). It equals eager attention that is renormalised over the image tokens per head and then averaged.

use tch::{Device, Kind, Tensor};

use crate::{ModelError, Result, TextConfig, VlmConfig};

/// Layers and heads whose attention is captured; their rows are averaged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AttentionSet {
    /// Layers, ascending, with their heads, ascending; `None`: all heads.
    layers: Vec<(usize, Option<Vec<i64>>)>,
}

impl AttentionSet {
    /// Selects all heads of one layer.
    pub fn layer(layer: usize) -> Self {
        Self { layers: vec![(layer, None)] }
    }

    /// Selects all heads of `layers`, and the single heads `[layer, head]`, both counted from 0. A layer that occurs in both has all its
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

    /// Like [`AttentionSet::new`], but selects the model's default layer if `layers` and `heads` are empty.
    pub fn configured(config: &VlmConfig, layers: &[usize], heads: &[[usize; 2]]) -> Self {
        if layers.is_empty() && heads.is_empty() {
            return Self::layer(config.default_capture_layer());
        }
        Self::new(layers, heads)
    }

    /// Checks that the set is not empty and that the model has its layers and heads.
    ///
    /// # Errors
    /// Returns [`ModelError::Input`] if not.
    pub fn check(&self, config: &TextConfig) -> Result<()> {
        let layers = config.num_hidden_layers;
        let heads = config.num_attention_heads;
        if self.layers.is_empty() {
            return Err(ModelError::input("no layer is selected for attention capture"));
        }
        for (layer, list) in &self.layers {
            if *layer >= layers {
                return Err(ModelError::input(format!(
                    "capture layer {layer} does not exist: the model has {layers} layers"
                )));
            }
            if let Some(head) = list.iter().flatten().find(|h| **h >= heads) {
                return Err(ModelError::input(format!(
                    "head {head} of layer {layer} does not exist: a layer has {heads} heads"
                )));
            }
        }
        Ok(())
    }

    /// Returns the captured layers with their heads; `None`: all heads.
    pub fn layers(&self) -> &[(usize, Option<Vec<i64>>)] {
        &self.layers
    }

    /// Returns the number of captured layers.
    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// Returns whether a layer is captured.
    pub(crate) fn captures(&self, layer: usize) -> bool {
        self.layers.iter().any(|(l, _)| *l == layer)
    }

    /// Returns the weight of one head: one over the number of (layer, head) pairs.
    pub(crate) fn head_weight(&self, heads: i64) -> f64 {
        let pairs: i64 = self.layers.iter().map(|(_, list)| list.as_ref().map_or(heads, |l| l.len() as i64)).sum();
        1.0 / pairs.max(1) as f64
    }

    /// Returns the captured heads of a layer; `None`: all heads.
    pub(crate) fn heads(&self, layer: usize, device: Device) -> Option<Tensor> {
        let list = self.layers.iter().find(|(l, _)| *l == layer)?.1.as_ref()?;
        Some(Tensor::from_slice(list).to_device(device))
    }

    /// Returns 1 for each captured head of a layer with `count` heads, 0 for the others; `None` if all are captured.
    pub(crate) fn head_flags(&self, layer: usize, count: i64) -> Option<Vec<u8>> {
        let list = self.layers.iter().find(|(l, _)| *l == layer)?.1.as_ref()?;
        Some((0..count).map(|head| u8::from(list.contains(&head))).collect())
    }

    /// Returns what one layer adds to the rows, `[B, Q, V]`: the softmax of the unscaled fp32 scores `[B, Hq, Q, V]` over the `valid` image
    /// tokens (broadcast), summed over the captured heads of the layer and divided by the number of pairs. `heads` is
    /// [`AttentionSet::heads`] of the layer.
    pub(crate) fn layer_rows(
        &self,
        scores: &Tensor,
        heads: Option<&Tensor>,
        valid: Option<&Tensor>,
        head_dim: i64,
    ) -> Tensor {
        let head_weight = self.head_weight(scores.size()[1]);
        let picked = heads.map(|index| scores.index_select(1, index));
        summed_image_softmax(picked.as_ref().unwrap_or(scores), valid, head_dim, &[1]) * head_weight
    }

    /// Like [`AttentionSet::layer_rows`] for all heads of grouped scores `[B, Hkv, Q, heads, V]`; `valid` is `[B, 1, 1, V]`.
    pub(crate) fn grouped_layer_rows(&self, scores: &Tensor, valid: Option<&Tensor>, head_dim: i64) -> Tensor {
        let size = scores.size();
        let head_weight = self.head_weight(size[1] * size[3]);
        summed_image_softmax(scores, valid.map(|v| v.unsqueeze(1)).as_ref(), head_dim, &[1, 3]) * head_weight
    }
}

/// Computes the softmax over the valid image tokens, summed over the dimensions `heads`.
fn summed_image_softmax(scores: &Tensor, valid: Option<&Tensor>, head_dim: i64, heads: &[i64]) -> Tensor {
    image_softmax(scores, valid, head_dim).sum_dim_intlist(heads, false, scores.kind())
}

/// Computes the softmax of unscaled scores over the valid image tokens, the last dimension.
fn image_softmax(scores: &Tensor, valid: Option<&Tensor>, head_dim: i64) -> Tensor {
    let (scores, kind) = (scores * (head_dim as f64).powf(-0.5), scores.kind());
    match valid {
        // The row of a sample without image tokens is zero, not uniform.
        Some(valid) => scores.masked_fill(&valid.logical_not(), MASKED_SCORE).softmax(-1, kind) * valid.to_kind(kind),
        None => scores.softmax(-1, kind),
    }
}

/// Attention to capture in a teacher-forced pass.
#[derive(Debug)]
pub struct Capture {
    /// Layers and heads.
    pub set: AttentionSet,
    /// Sequence positions of the query tokens `[B, Q]`; pad with any valid position.
    pub queries: Tensor,
    /// Sequence positions of the image tokens `[B, V]`; pad with any valid position.
    pub image_index: Tensor,
    /// Whether each image token is real, not padding `[B, V]`, bool.
    pub image_valid: Tensor,
    /// Whether to keep the autograd graph, so that a loss on the rows trains the model.
    pub differentiable: bool,
    /// Weights `[B, S, Q]` of sets of queries: return the rows of every single head for each set, `[B, heads, S, V]`. `None`: average over
    /// heads.
    pub pool: Option<Tensor>,
}

impl Capture {
    /// Returns a copy that shares the tensors.
    pub(crate) fn shallow_clone(&self) -> Self {
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

/// Attention to capture in a packed pass, where the batch determines the positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureSpec {
    /// Layers and heads.
    pub set: AttentionSet,
    /// Whether to keep the autograd graph.
    pub differentiable: bool,
}

/// Score of masked image tokens.
const MASKED_SCORE: f64 = -1e30;

/// Returns what `layer` adds to the rows `[B, Q, V]` of a pass with queries `q [B, Hq, L, d]` and keys `k [B, Hkv, L, d]`; with
/// [`Capture::pool`], the rows of its single heads.
pub(crate) fn capture_rows(layer: usize, q: &Tensor, k: &Tensor, capture: &Capture) -> Tensor {
    let (q, k) = if capture.differentiable { (q.shallow_clone(), k.shallow_clone()) } else { (q.detach(), k.detach()) };
    let q_size = q.size();
    let b = q_size[0];
    let hq = q_size[1];
    let d = q_size[3];
    let hkv = k.size()[1];
    let nq = capture.queries.size()[1];
    let nv = capture.image_index.size()[1];
    let q = gather_positions(&q, &capture.queries).reshape([b, hkv, hq / hkv * nq, d]);
    let k = gather_positions(&k, &capture.image_index);
    let scores = q.matmul(&k.transpose(-1, -2)).view([b, hq, nq, nv]);
    let heads = capture.set.heads(layer, scores.device());
    let valid = capture.image_valid.view([b, 1, 1, nv]);
    match &capture.pool {
        None => capture.set.layer_rows(&scores, heads.as_ref(), Some(&valid), d),
        Some(pool) => pool.unsqueeze(1).matmul(&image_softmax(&scores, Some(&valid), d)),
    }
}

/// Returns positions `index [B, N]` of `t [B, H, L, d]`: `[B, H, N, d]`.
pub(crate) fn gather_positions(t: &Tensor, index: &Tensor) -> Tensor {
    let size = t.size();
    let n = index.size()[1];
    t.gather(2, &index.view([size[0], 1, n, 1]).expand([size[0], size[1], n, size[3]], false), false)
}

/// Computes softmax attention of fp32 `q [B, H, Q, d]` over `k, v [B, H, K, d]`, fp32 or bf16, with an additive `bias` (broadcast to
/// `[B, H, Q, K]`), and the log-sum-exp of each row `[B, H, Q]`, both fp32. With bf16 keys a GPU also rounds `q` to bf16. Two parts merged by [`merge_by_lse`] equal one softmax over both (Hydragen, arXiv
/// 2402.05099, section 3.1). Has no gradient.
pub(crate) fn attend_with_lse(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>) -> (Tensor, Tensor) {
    let size = q.size();
    let full = [size[0], size[1], size[2], k.size()[2]];
    match q.device() {
        Device::Cuda(_) => {
            let bias = bias.map(|b| b.to_kind(k.kind()).expand(full, false));
            let q = q.to_kind(k.kind());
            let (out, lse, _, _) =
                Tensor::internal_scaled_dot_product_efficient_attention(&q, k, v, bias, true, 0.0, false, None::<f64>);
            // The kernel pads the rows of its sums to a multiple of its block.
            (out.to_kind(Kind::Float), lse.narrow(2, 0, size[2]))
        }
        _ => {
            let k = k.to_kind(q.kind());
            let v = v.to_kind(q.kind());
            Tensor::internal_scaled_dot_product_flash_attention_for_cpu(q, &k, &v, 0.0, false, bias, None::<f64>)
        }
    }
}

/// Merges two parts of an attention, each an output `[.., d]` and its log-sum-exp `[..]`.
pub(crate) fn merge_by_lse((a, lse_a): (Tensor, Tensor), (b, lse_b): (Tensor, Tensor)) -> Tensor {
    // The weight of the first part is exp(lse_a) / (exp(lse_a) + exp(lse_b)).
    let share = (lse_a - lse_b).sigmoid().unsqueeze(-1);
    b.lerp_tensor(&a, &share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_parts_equal_one_softmax() {
        tch::manual_seed(3);
        for (heads, queries, first, second, d) in [(2, 5, 7, 3, 16), (1, 1, 1, 9, 8), (3, 8, 40, 1, 32)] {
            let r = |n: i64| Tensor::randn([2, heads, n, d], (Kind::Float, Device::Cpu)) * 2.0;
            let q = r(queries);
            let k = r(first + second);
            let v = r(first + second);
            let bias = Tensor::zeros([2, 1, 1, first], (Kind::Float, Device::Cpu));
            let _ = bias.get(1).narrow(2, first / 2, first - first / 2 - first % 2).fill_(f64::NEG_INFINITY);
            let keys = |t: &Tensor, a, b| t.narrow(2, a, b);
            let first_part = attend_with_lse(&q, &keys(&k, 0, first), &keys(&v, 0, first), Some(&bias));
            let second = (keys(&k, first, second), keys(&v, first, second));
            let second_part = attend_with_lse(&q, &second.0, &second.1, None);
            let second = second.0.size()[2];
            let whole_bias = Tensor::cat(&[bias, Tensor::zeros([2, 1, 1, second], (Kind::Float, Device::Cpu))], -1);
            let scores = q.matmul(&k.transpose(-1, -2)) * (d as f64).powf(-0.5) + whole_bias;
            let whole = scores.softmax(-1, Kind::Float).matmul(&v);
            let diff = (merge_by_lse(first_part, second_part) - whole).abs().max().double_value(&[]);
            assert!(diff < 1e-5, "{diff}");
        }
    }

    #[test]
    fn sets_name_layers_and_heads() {
        let set = AttentionSet::new(&[3], &[[1, 2], [1, 0], [3, 1], [1, 2]]);
        assert_eq!(set.layers, vec![(1, Some(vec![0, 2])), (3, None)]);
        assert!((set.head_weight(4) - 1.0 / 6.0).abs() < 1e-12);
        assert!(set.captures(1) && set.captures(3) && !set.captures(2));
        // With uniform scores every row is uniform, and the parts of the two layers sum to 1.
        let scores = Tensor::zeros([1, 4, 2, 5], (Kind::Float, Device::Cpu));
        let rows = |layer| set.layer_rows(&scores, set.heads(layer, Device::Cpu).as_ref(), None, 16);
        let sum = rows(1) + rows(3);
        assert!((sum - 0.2).abs().max().double_value(&[]) < 1e-6);
    }
}
