//! Differentiable vision relevance, computed from the attention rows that the learner recomputes.

use tch::Tensor;

use crate::AlgoError;
use crate::error::expect_shape;

/// The tokens of a batch that mention the abnormal class, and the image cells that true boxes cover.
///
/// Rows of `coverage` and `baseline` correspond to the R responses whose sample has vision relevance (a true box that is not the whole
/// image). A response without a mention has no entry in `tokens`, and its reward is 0.
#[derive(Debug)]
pub struct MentionBatch {
    /// `[K]` Int64: indices into the N rows of attention, the tokens of each response's first mention.
    pub tokens: Tensor,
    /// `[K]` Int64: the response, of R, that each of these tokens belongs to.
    pub response: Tensor,
    /// `[R, V]`, floating-point: M, the share of each cell that true boxes cover; 0 beyond the sample's image.
    pub coverage: Tensor,
    /// `[R]`, floating-point: a, the mean of M over the sample's cells, below 1.
    pub baseline: Tensor,
}

/// Returns the vision relevance of each response, `[R]`: (s - a) / (1 - a) with s the mean over mention tokens of sum_j M_j p_ij, and 0
/// for a response without a mention (definition of the method page; the loss form follows EASE, arXiv 2605.30912).
///
/// The reward clips this to `[0, 1]`. Here the lower clip is omitted, since it would remove the gradient where attention looks away from
/// the lesion and a gradient is needed most; the upper one never takes effect, as s <= 1. Differentiable in `attention` `[N, V]`, and of
/// its dtype.
///
/// # Errors
/// Returns [`AlgoError::Shape`] if the shapes do not match.
pub fn attention_rewards(attention: &Tensor, m: &MentionBatch) -> Result<Tensor, AlgoError> {
    let responses = m.baseline.size().first().copied().unwrap_or(0);
    let width = attention.size().get(1).copied().unwrap_or(0);
    expect_shape("coverage", &m.coverage, &[responses, width])?;
    expect_shape("response", &m.response, &m.tokens.size())?;
    let kind = attention.kind();
    let rows = attention.f_index_select(0, &m.tokens)?;
    let covered = m.coverage.f_to_kind(kind)?.f_index_select(0, &m.response)?;
    let per_token = (rows * covered).f_sum_dim_intlist([1i64].as_slice(), false, kind)?;
    let zeros = Tensor::zeros([responses], (kind, attention.device()));
    let counts = zeros.f_index_add(0, &m.response, &per_token.ones_like())?;
    let mean = zeros.f_index_add(0, &m.response, &per_token)? / counts.clamp_min(1.0);
    let baseline = m.baseline.f_to_kind(kind)?;
    let relevance = (mean - &baseline) / (1.0 - &baseline);
    Ok(relevance * counts.gt(0.0).to_kind(kind))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn batch(tokens: &[i64], response: &[i64]) -> MentionBatch {
        MentionBatch {
            tokens: Tensor::from_slice(tokens),
            response: Tensor::from_slice(response),
            coverage: Tensor::from_slice(&[1.0f32, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]).view([2, 4]),
            baseline: Tensor::from_slice(&[0.25f32, 0.25]),
        }
    }

    #[test]
    fn uniform_attention_is_zero_and_focused_is_one() {
        let rows =
            Tensor::from_slice(&[0.25f32, 0.25, 0.25, 0.25, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]).view([3, 4]);
        let r = attention_rewards(&rows, &batch(&[0, 1], &[0, 1])).unwrap();
        assert!(r.double_value(&[0]).abs() < 1e-6 && (r.double_value(&[1]) - 1.0).abs() < 1e-6);
        let away = attention_rewards(&rows, &batch(&[2], &[0])).unwrap();
        assert!(away.double_value(&[0]) < 0.0, "attention outside the boxes is below 0 and keeps its gradient");
        assert_eq!(away.double_value(&[1]), 0.0, "no mention");
    }

    #[test]
    fn wrong_coverage_shape_is_an_error() {
        let rows = Tensor::zeros([3, 5], (Kind::Float, tch::Device::Cpu));
        assert!(matches!(attention_rewards(&rows, &batch(&[0], &[0])), Err(AlgoError::Shape { what: "coverage", .. })));
    }
}
