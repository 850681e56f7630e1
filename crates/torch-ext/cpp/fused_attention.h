// libtorch's fused attention kernels with the log-sum-exp of each row, forward and backward, behind one pair of functions for the CPU and
// for GPUs. Queries are [B, H, Sq, d], keys and values [B, Hk, Sk, d] with Hk dividing H; the log-sum-exp is [B, H, Sq], the natural
// logarithm of the scaled scores' sum. No part may be empty: the CPU kernel ends the process then.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <tuple>

namespace fused {

using at::Tensor;

// The kernels compute nonsense, without an error, if the last stride is not 1.
inline Tensor dense_rows(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

// The flash kernel for GPUs exists for half precision only; it takes grouped heads. The other one does not.
inline bool has_flash(const Tensor& q) { return q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf; }

// Keys or values with one head for each of the `heads` query heads.
inline Tensor one_per_query_head(const Tensor& t, int64_t heads) {
  const int64_t groups = t.size(1);
  if (groups == heads) return t;
  return t.unsqueeze(2).expand({t.size(0), groups, heads / groups, t.size(2), t.size(3)}).reshape({t.size(0), heads, t.size(2), t.size(3)});
}

// The reverse for gradients: the sum over the query heads of each key head.
inline Tensor sum_of_query_heads(const Tensor& t, int64_t groups) {
  if (t.size(1) == groups) return t;
  return t.reshape({t.size(0), groups, t.size(1) / groups, t.size(2), t.size(3)}).sum(2);
}

struct Forward {
  Tensor out;
  Tensor lse;
};

inline Forward forward(const Tensor& query, const Tensor& key, const Tensor& value, bool causal) {
  const Tensor q = dense_rows(query);
  Tensor k = dense_rows(key);
  Tensor v = dense_rows(value);
  if (!q.is_cuda()) {
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal);
    return {out, lse};
  }
  if (has_flash(q)) {
    auto result = at::_scaled_dot_product_flash_attention(q, k, v, 0.0, causal, false);
    return {std::get<0>(result), std::get<1>(result)};
  }
  k = one_per_query_head(k, q.size(1));
  v = one_per_query_head(v, q.size(1));
  auto result = at::_scaled_dot_product_efficient_attention(q, k, v, std::nullopt, true, 0.0, causal);
  // The kernel pads the log-sum-exp to a multiple of its block.
  return {std::get<0>(result), std::get<1>(result).narrow(2, 0, q.size(2))};
}

struct Gradients {
  Tensor q;
  Tensor k;
  Tensor v;
};

// The gradients of one part of an attention: `out` and `lse` are those of the whole attention, as in ring attention (arXiv 2310.01889).
inline Gradients backward(const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& joined_out,
                          const Tensor& joined_lse, bool causal) {
  const Tensor grad = dense_rows(grad_out);
  const Tensor out = dense_rows(joined_out);
  const Tensor q = dense_rows(query);
  Tensor k = dense_rows(key);
  Tensor v = dense_rows(value);
  if (!q.is_cuda()) {
    auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, joined_lse, 0.0, causal);
    return {dq, dk, dv};
  }
  // Random state of dropout, which is not used.
  const Tensor seed = at::zeros({2}, q.options().dtype(at::kLong));
  const Tensor offset = at::zeros({}, q.options().dtype(at::kLong));
  const int64_t rows = q.size(2);
  if (has_flash(q)) {
    // The kernel reads the log-sum-exp as contiguous memory.
    auto [dq, dk, dv] =
        at::_scaled_dot_product_flash_attention_backward(grad, q, k, v, out, joined_lse.contiguous(), Tensor(), Tensor(), rows, k.size(2),
                                                         0.0, causal, seed, offset);
    return {dq, dk, dv};
  }
  const int64_t groups = k.size(1);
  k = one_per_query_head(k, q.size(1));
  v = one_per_query_head(v, q.size(1));
  const int64_t block = 32;
  Tensor lse = at::full({q.size(0), q.size(1), (rows + block - 1) / block * block}, std::numeric_limits<double>::infinity(),
                        joined_lse.options());
  lse.narrow(2, 0, rows).copy_(joined_lse);
  auto result = at::_scaled_dot_product_efficient_attention_backward(grad, q, k, v, Tensor(), out, lse, seed, offset, 0.0,
                                                                     {true, true, true, false}, causal);
  return {std::get<0>(result), sum_of_query_heads(std::get<1>(result), groups), sum_of_query_heads(std::get<2>(result), groups)};
}

}  // namespace fused
