// Matrix products whose operands are narrower than their results, with gradients in full precision, as C functions: 0, or 1 with a message.

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "guarded.h"
#include "tensor_handle.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The product of matrices of half precision in fp32. The CPU has no such product, but those of bf16 numbers are exact in fp32.
Tensor wide_product(const Tensor& a, const Tensor& b) {
  return a.is_cuda() ? at::mm(a, b, at::kFloat) : at::mm(a.to(at::kFloat), b.to(at::kFloat));
}

// How a product is computed.
struct Setup {
  // All matrices in one, and their biases, if they are stored so; else undefined.
  Tensor whole;
  Tensor whole_bias;
  // Whether both operands are rounded to bf16; else the weights are converted to the dtype of the input.
  bool rounded;
};

Tensor joined(const Tensor& whole, at::TensorList parts) {
  if (whole.defined()) return whole;
  return parts.size() == 1 ? parts[0] : at::cat(parts);
}

struct MixedLinear : torch::autograd::Function<MixedLinear> {
  // input [.., K], weights [N_i, K], biases [N_i] or none; returns [.., sum N_i] in the dtype of the input.
  static Tensor forward(AutogradContext* ctx, const Tensor& input, at::TensorList weights, at::TensorList biases, const Setup* setup) {
    const auto kind = input.scalar_type();
    const Tensor weight = joined(setup->whole, weights);
    Tensor x = input.reshape({-1, input.size(-1)});
    Tensor out;
    if (setup->rounded) {
      x = x.to(at::kBFloat16);
      out = wide_product(x, weight.to(at::kBFloat16).t());
      if (!biases.empty()) out.add_(joined(setup->whole_bias, biases));
    } else if (biases.empty()) {
      out = at::linear(x, weight.to(kind));
    } else {
      out = at::linear(x, weight.to(kind), joined(setup->whole_bias, biases).to(kind));
    }
    const auto trained = [](const Tensor& t) { return t.requires_grad(); };
    const bool needs_x = std::any_of(weights.begin(), weights.end(), trained);
    // Weights are saved as they are stored, without a converted copy.
    ctx->save_for_backward({needs_x ? x : Tensor(), weight});
    std::vector<int64_t> rows;
    for (const auto& w : weights) rows.push_back(w.size(0));
    ctx->saved_data["rows"] = rows;
    ctx->saved_data["biased"] = !biases.empty();
    ctx->saved_data["rounded"] = setup->rounded;
    ctx->saved_data["shape"] = input.sizes().vec();
    auto shape = input.sizes().vec();
    shape.back() = out.size(1);
    return out.view(shape);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const auto rows = ctx->saved_data["rows"].toIntVector();
    const bool biased = ctx->saved_data["biased"].toBool();
    const bool rounded = ctx->saved_data["rounded"].toBool();
    const auto count = rows.size();
    const Tensor grad = grads[0].reshape({-1, grads[0].size(-1)});
    const Tensor operand = rounded ? grad.to(at::kBFloat16) : grad;
    const auto product = [&](const Tensor& a, const Tensor& b) { return rounded ? wide_product(a, b) : at::mm(a, b); };
    const auto any_needed = [&](size_t first) {
      for (size_t i = first; i < first + count; ++i) {
        if (ctx->needs_input_grad(i)) return true;
      }
      return false;
    };
    variable_list out;
    if (ctx->needs_input_grad(0)) {
      const Tensor w = weight.to(rounded ? at::kBFloat16 : grad.scalar_type());
      out.push_back(product(operand, w).view(ctx->saved_data["shape"].toIntVector()));
    } else {
      out.emplace_back();
    }
    const auto split = [&](bool needed, size_t first, const auto& total) {
      const Tensor all = needed ? total() : Tensor();
      int64_t row = 0;
      for (size_t i = 0; i < count; ++i) {
        out.push_back(needed && ctx->needs_input_grad(first + i) ? all.narrow(0, row, rows[i]) : Tensor());
        row += rows[i];
      }
    };
    split(x.defined() && any_needed(1), 1, [&] { return product(operand.t(), x); });
    if (biased) split(any_needed(1 + count), 1 + count, [&] { return grad.sum(0); });
    out.emplace_back();
    return out;
  }
};

// Rounds values to bf16; the gradient passes as it is.
struct Round : torch::autograd::Function<Round> {
  static Tensor forward(AutogradContext*, const Tensor& t) { return t.to(at::kBFloat16).to(t.scalar_type()); }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0]}; }
};

}  // namespace

extern "C" {

// The product of `input` with `count` matrices that share it, plus their biases (all or none). `whole` and `whole_bias` hold the same
// numbers in one tensor, or are null. With `rounded` both operands are rounded to bf16.
int unveil_mixed_linear(const void* input, const void* const* weights, const void* const* biases, int64_t count, const void* whole,
                        const void* whole_bias, int rounded, void** out, char* message, size_t size) {
  return guarded(message, size, [&] {
    const Tensor& x = tensor_of(input);
    const auto w = tensors_of(weights, count);
    const auto b = biases == nullptr ? variable_list() : tensors_of(biases, count);
    TORCH_CHECK(count > 0 && x.dim() > 0 && x.is_floating_point(), "an input of ", x.sizes(), " for ", count, " matrices");
    TORCH_CHECK(rounded == 0 || x.scalar_type() == at::kFloat, "products of bf16 operands need an fp32 input, not ", x.scalar_type());
    int64_t rows = 0;
    for (const auto& t : w) {
      TORCH_CHECK(t.dim() == 2 && t.size(1) == x.size(-1), "a matrix of ", t.sizes(), " for an input of ", x.sizes());
      rows += t.size(0);
    }
    for (int64_t i = 0; i < static_cast<int64_t>(b.size()); ++i) {
      TORCH_CHECK(b[i].dim() == 1 && b[i].size(0) == w[i].size(0), "a bias of ", b[i].sizes(), " for a matrix of ", w[i].sizes());
    }
    Setup setup{Tensor(), Tensor(), rounded != 0};
    if (whole != nullptr) setup.whole = tensor_of(whole).detach();
    if (whole_bias != nullptr) setup.whole_bias = tensor_of(whole_bias).detach();
    TORCH_CHECK(!setup.whole.defined() || setup.whole.sizes() == at::IntArrayRef({rows, x.size(-1)}), "matrices of ", rows,
                " rows in one of ", setup.whole.sizes());
    TORCH_CHECK(!setup.whole_bias.defined() || setup.whole_bias.sizes() == at::IntArrayRef({rows}), "biases of ", rows, " rows in one of ",
                setup.whole_bias.sizes());
    *out = new_handle(MixedLinear::apply(x, at::TensorList(w), at::TensorList(b), static_cast<const Setup*>(&setup)));
  });
}

int unveil_round_through(const void* tensor, void** out, char* message, size_t size) {
  return guarded(message, size, [&] { *out = new_handle(Round::apply(tensor_of(tensor))); });
}

// Makes the gradients of a leaf fp32. Otherwise the engine rounds each one to the dtype of the leaf.
int unveil_wide_gradient(const void* tensor, char* message, size_t size) {
  return guarded(message, size, [&] { tensor_of(tensor).set_grad_dtype(at::kFloat); });
}
}
