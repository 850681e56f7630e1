//! Small tensor operations that both towers share. Numerics follow the Hugging Face implementation of the families, but
//! activations are fp32 whatever the weights are: attention over parts that are joined later, and products over more or
//! fewer rows, round differently, and rounding to bf16 after each would blow such differences up until rollout and
//! training disagree about log-probabilities.

use tch::{Device, Kind, Tensor};

/// The kind of activations behind weights of `kind`: fp32, or fp64 where the weights are.
pub fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// A copy in memory of its own, without gradients.
pub(crate) fn duplicate(t: &Tensor) -> crate::Result<Tensor> {
    let t = t.f_detach()?;
    let mut copy = t.f_empty_like()?;
    copy.f_copy_(&t)?;
    Ok(copy)
}

/// RMS norm: `w * (x / sqrt(mean(x^2) + eps))`, fp32.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    x.rms_norm(weight.size().as_slice(), Some(weight.to_kind(x.kind())), Some(eps))
}

/// Layer norm, fp32.
pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Tensor {
    let (weight, bias) = (weight.to_kind(x.kind()), bias.to_kind(x.kind()));
    x.layer_norm(weight.size().as_slice(), Some(weight), Some(bias), eps, false)
}

/// Rotates pairs `(i, i + d/2)` of the last dimension; `cos` and `sin` hold half the last dimension and broadcast.
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = cos.size()[cos.dim() - 1];
    let (a, b) = split2(x, -1, half, half);
    Tensor::cat(&[&a * cos - &b * sin, &b * cos + &a * sin], -1)
}

/// `x W^T (+ b)` in fp32. Half-precision weights stay as they are on a GPU: x is cut into two half-precision summands that
/// meet them in one product, summed in fp32. That keeps about 16 of x's 24 digits and reads the weights once.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let kind = weight.kind();
    if kind == x.kind() {
        return few_rows(x, weight, bias).unwrap_or_else(|| x.linear(weight, bias));
    }
    let bias = bias.map(|b| b.to_kind(x.kind()));
    if !matches!(x.device(), Device::Cuda(_)) || recorded([x, weight]) {
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

/// Whether what is done with these tensors is recorded for a backward pass. That a weight is trained does not say so: the old
/// log-probabilities and the evaluations of a learner record nothing.
pub(crate) fn recorded<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    tensors.into_iter().any(Tensor::requires_grad) && unveil_torch_ext::grad_enabled()
}

/// The product of few rows on the CPU, where libtorch's own reads the weights more than once.
fn few_rows(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Option<Tensor> {
    let few = x.dim() == 2 && x.size()[0] <= FEW;
    if !few
        || recorded([Some(x), Some(weight), bias].into_iter().flatten())
        || x.device() != Device::Cpu
        || x.kind() != Kind::Float
    {
        return None;
    }
    unveil_torch_ext::linear(x, weight, bias).ok()
}

/// Rows up to which it is the faster one.
pub(crate) const FEW: i64 = 64;

/// Scaled dot-product attention with the library's fused kernels; heads of `k` and `v` may be fewer (grouped queries).
pub(crate) fn sdpa(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, q.size()[1] != k.size()[1])
}

/// `1 / base^(2i / dim)` for i in `0..dim/2`, as fp32.
pub(crate) fn inverse_frequencies(base: f64, dim: i64) -> Vec<f32> {
    (0..dim / 2).map(|i| (1.0 / base.powf((2 * i) as f64 / dim as f64)) as f32).collect()
}

/// Cuts a dimension in two. Unlike two `narrow`s, the gradient of this is one concatenation.
pub(crate) fn split2(x: &Tensor, dim: i64, first: i64, second: i64) -> (Tensor, Tensor) {
    let mut parts = x.split_with_sizes([first, second], dim);
    let b = parts.remove(1);
    (parts.remove(0), b)
}
