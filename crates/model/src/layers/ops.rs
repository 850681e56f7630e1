//! Tensor operations that decoder and vision tower share. Numerics follow the Hugging Face implementations, but activations are fp32
//! whatever the dtype of the weights: attention in merged parts and products over different numbers of rows round differently, and
//! rounding to bf16 after each would amplify the differences until rollout and training disagree about log-probabilities.

use tch::{Device, Kind, Tensor};
use unveil_core::Compute;
use unveil_torch_ext::{MatrixSet, Operands, mixed_linear};

use crate::compute::attention_operands;
use crate::error::or_panic;

/// Returns the dtype of activations for weights of dtype `kind`: fp64 for fp64 weights, else fp32.
pub fn activation_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Copies a tensor to new memory, without gradients.
pub(crate) fn detached_copy(t: &Tensor) -> crate::Result<Tensor> {
    let t = t.f_detach()?;
    let mut copy = t.f_empty_like()?;
    copy.f_copy_(&t)?;
    Ok(copy)
}

/// Computes the RMS norm `w * (x / sqrt(mean(x^2) + eps))`, fp32.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    x.rms_norm(weight.size().as_slice(), Some(weight.to_kind(x.kind())), Some(eps))
}

/// Computes the layer norm, fp32.
pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Tensor {
    let weight = weight.to_kind(x.kind());
    let bias = bias.to_kind(x.kind());
    x.layer_norm(weight.size().as_slice(), Some(weight), Some(bias), eps, false)
}

/// Rotates pairs `(i, i + d/2)` of the last dimension; `cos` and `sin` hold half the last dimension and broadcast.
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = cos.size()[cos.dim() - 1];
    let (a, b) = split2(x, -1, half, half);
    Tensor::cat(&[&a * cos - &b * sin, &b * cos + &a * sin], -1)
}

/// Computes `x W^T (+ b)` in fp32 from operands that `compute` selects. Half-precision weights are not converted on a GPU in the other
/// modes: x is split into two half-precision summands that are multiplied in one product and summed in fp32. This keeps about 16 of the
/// 24 mantissa bits of x and reads the weights once.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, compute: Compute) -> Tensor {
    let kind = weight.kind();
    let recorded = records_gradients([Some(x), Some(weight), bias].into_iter().flatten());
    let operands = product_operands(x, compute);
    if operands == Operands::Bf16 || (recorded && kind != x.kind()) {
        let biases: Vec<&Tensor> = bias.into_iter().collect();
        return linear_set(x, &MatrixSet { weights: &[weight], biases: &biases, whole: None }, compute);
    }
    if kind == x.kind() {
        return linear_few_rows(x, weight, bias).unwrap_or_else(|| x.linear(weight, bias));
    }
    let bias = bias.map(|b| b.to_kind(x.kind()));
    if !matches!(x.device(), Device::Cuda(_)) {
        return x.linear(&weight.to_kind(x.kind()), bias);
    }
    let mut size = x.size();
    let flat = x.reshape([-1, size[size.len() - 1]]);
    let high = flat.to_kind(kind);
    let low = (&flat - high.to_kind(x.kind())).to_kind(kind);
    let rows = flat.size()[0];
    let (a, b) = split2(&Tensor::cat(&[high, low], 0).mm_dtype(&weight.tr(), x.kind()), 0, rows, rows);
    let out = match bias {
        None => a + b,
        Some(bias) => a + b + bias,
    };
    if let Some(last) = size.last_mut() {
        *last = weight.size()[0];
    }
    out.view(size.as_slice())
}

/// Computes the products of `x` with a set of matrices, whose gradients are fp32.
pub(crate) fn linear_set(x: &Tensor, set: &MatrixSet<'_>, compute: Compute) -> Tensor {
    or_panic(mixed_linear(x, set, product_operands(x, compute)))
}

/// Returns the operands of products with `x`.
fn product_operands(x: &Tensor, compute: Compute) -> Operands {
    if compute == Compute::Fast && x.kind() == Kind::Float { Operands::Bf16 } else { Operands::Input }
}

/// Returns whether an operation on these tensors is recorded for a backward pass. A trainable weight alone does not imply it: a learner
/// computes old log-probabilities and evaluations without recording.
pub(crate) fn records_gradients<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    tensors.into_iter().any(Tensor::requires_grad) && unveil_torch_ext::grad_enabled()
}

/// Computes the product for few rows on the CPU, where libtorch would read the weights more than once; `None` if it does not apply.
fn linear_few_rows(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Option<Tensor> {
    let few = x.dim() == 2 && x.size()[0] <= FEW_ROWS;
    if !few
        || records_gradients([Some(x), Some(weight), bias].into_iter().flatten())
        || x.device() != Device::Cpu
        || x.kind() != Kind::Float
    {
        return None;
    }
    unveil_torch_ext::linear(x, weight, bias).ok()
}

/// Number of rows up to which [`linear_few_rows`] is faster than libtorch.
pub(crate) const FEW_ROWS: i64 = 64;

/// Returns an additive mask of dtype `kind`: minus infinity where `mask` is true, 0 elsewhere.
pub(crate) fn minus_infinity_where(mask: &Tensor, kind: Kind) -> Tensor {
    Tensor::zeros(mask.size().as_slice(), (kind, mask.device())).masked_fill(mask, f64::NEG_INFINITY)
}

/// Computes scaled dot-product attention with libtorch's fused kernels, in the dtype of `q`; `k` and `v` may have fewer heads (grouped
/// queries).
pub(crate) fn sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
    compute: Compute,
) -> Tensor {
    let operands = attention_operands(compute, q);
    let kind = q.kind();
    let heads = q.size()[1];
    let grouped = heads != k.size()[1];
    // On a GPU, the only fused kernel for fp32 refuses grouped heads, and libtorch would compute all scores.
    let expand = grouped && q.device().is_cuda() && operands == Kind::Float;
    let prepared = |t: &Tensor| {
        let t = t.to_kind(operands);
        if expand { t.repeat_interleave_self_int(heads / t.size()[1], 1, heads) } else { t }
    };
    let mask = mask.map(|m| m.to_kind(operands));
    let (q, k, v) = (q.to_kind(operands), prepared(k), prepared(v));
    Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, causal, None, grouped && !expand).to_kind(kind)
}

/// Returns `1 / base^(2i / dim)` for i in `0..dim/2`, as fp32.
pub(crate) fn inverse_frequencies(base: f64, dim: i64) -> Vec<f32> {
    (0..dim / 2).map(|i| (1.0 / base.powf((2 * i) as f64 / dim as f64)) as f32).collect()
}

/// Splits a dimension in two. Unlike with two `narrow`s, the gradient is a single concatenation.
pub(crate) fn split2(x: &Tensor, dim: i64, first: i64, second: i64) -> (Tensor, Tensor) {
    let mut parts = x.split_with_sizes([first, second], dim);
    let b = parts.remove(1);
    (parts.remove(0), b)
}
