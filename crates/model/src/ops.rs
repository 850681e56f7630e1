//! Small tensor operations that both towers share. Numerics follow the Hugging Face implementation of the family.

use tch::{Kind, Tensor};

/// RMS norm: `w * (x / sqrt(mean(x^2) + eps))`, the mean in fp32.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let kind = x.kind();
    if kind == Kind::Float {
        return x.rms_norm(weight.size().as_slice(), Some(weight), Some(eps));
    }
    let wide = x.to_kind(Kind::Float);
    let scale = ((&wide * &wide).mean_dim([-1i64].as_slice(), true, Kind::Float) + eps).rsqrt();
    (wide * scale).to_kind(kind) * weight
}

/// Rotates pairs `(i, i + d/2)` of the last dimension; `cos` and `sin` hold half the last dimension and broadcast.
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = cos.size()[cos.dim() - 1];
    let (a, b) = split2(x, -1, half, half);
    Tensor::cat(&[&a * cos - &b * sin, &b * cos + &a * sin], -1)
}

/// `x W^T (+ b)`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    x.linear(weight, bias)
}

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
