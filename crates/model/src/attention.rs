//! Attention capture: what a token looks at among the image tokens, in fp32, from post-rotary queries and keys.
//!
//! One row per query token: softmax over the image tokens only, averaged over the heads of one layer. It equals eager
//! attention renormalised over the image tokens per head, then averaged.

use tch::{Kind, Tensor};

/// What to capture in a teacher-forced pass.
pub struct Capture {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Sequence positions of the query tokens `[B, Q]`; pad with any valid position.
    pub queries: Tensor,
    /// Sequence positions of the image tokens `[B, V]`; pad with any valid position.
    pub image_index: Tensor,
    /// Which of them are real `[B, V]`, bool.
    pub image_valid: Tensor,
    /// Keep the graph, so that a loss on the rows trains the model.
    pub differentiable: bool,
}

/// What to capture where the positions are known from the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptureSpec {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Keep the graph.
    pub differentiable: bool,
}

const NEVER: f64 = -1e30;

/// Rows `[B, Q, V]` of a pass with queries `q [B, Hq, L, d]` and keys `k [B, Hkv, L, d]`.
pub(crate) fn capture_rows(q: &Tensor, k: &Tensor, capture: &Capture) -> Tensor {
    let (q, k) = if capture.differentiable { (q.shallow_clone(), k.shallow_clone()) } else { (q.detach(), k.detach()) };
    let (qs, ks) = (q.size(), k.size());
    let (b, hq, hkv, d) = (qs[0], qs[1], ks[1], qs[3]);
    let (nq, nv) = (capture.queries.size()[1], capture.image_index.size()[1]);
    let pick = |t: &Tensor, index: &Tensor, heads: i64, n: i64| {
        t.gather(2, &index.view([b, 1, n, 1]).expand([b, heads, n, d], false), false)
    };
    let q = pick(&q, &capture.queries, hq, nq).to_kind(Kind::Float).reshape([b, hkv, hq / hkv * nq, d]);
    let k = pick(&k, &capture.image_index, hkv, nv).to_kind(Kind::Float);
    let scores = q.matmul(&k.transpose(-1, -2)).view([b, hq, nq, nv]);
    rows_of_scores(&scores, &capture.image_valid.view([b, 1, 1, nv]), d, 1)
}

/// Scores (unscaled, fp32) over image tokens to rows: scale, softmax over the valid ones, mean over `heads_dim`.
pub(crate) fn rows_of_scores(scores: &Tensor, valid: &Tensor, head_dim: i64, heads_dim: i64) -> Tensor {
    let scores = (scores * (head_dim as f64).powf(-0.5)).masked_fill(&valid.logical_not(), NEVER);
    // A sample without an image has no valid token: its row is zero, not uniform.
    let rows = scores.softmax(-1, Kind::Float) * valid.to_kind(Kind::Float);
    rows.mean_dim([heads_dim].as_slice(), false, Kind::Float)
}
