// Attention of packed sequences, a prompt followed by responses that do not see each other, in parts that are joined by their
// log-sum-exp: no mask exists, and a prompt's keys and values are read in place by all of its responses. As C functions: 0, or 1 with a
// message.

#include <torch/csrc/autograd/custom_function.h>

#include "fused_attention.h"
#include "guarded.h"
#include "tensor_handle.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// One sequence of a row: prompt [start, prompt), responses [prompt, end).
struct Sequence {
  int64_t row;
  int64_t start;
  int64_t prompt;
  int64_t end;
};

// Responses of similar length, padded to `width` tokens.
struct Bucket {
  int64_t width;
  // Position in B * L of each row of the padded responses [m * width]; padding repeats the last token.
  Tensor gather;
  // Rows of the padded responses that are tokens [N].
  Tensor real;
  // Their positions in B * L [N].
  Tensor place;
};

struct Layout : torch::CustomClassHolder {
  std::vector<Sequence> sequences;
  std::vector<Bucket> buckets;
  // Dtype of queries, keys and values inside the kernels.
  at::ScalarType operands;
};

// Sequences in neighbouring rows whose prompts, or prompts and responses, have the same positions: one batch of a kernel.
struct Run {
  int64_t row;
  int64_t rows;
  Sequence at;
};

std::vector<Run> equal_runs(const std::vector<Sequence>& all, bool with_responses) {
  std::vector<Run> runs;
  for (const auto& s : all) {
    const auto follows = [&](const Run& run) {
      return run.row + run.rows == s.row && run.at.start == s.start && run.at.prompt == s.prompt &&
             (!with_responses || run.at.end == s.end);
    };
    if (!runs.empty() && follows(runs.back())) {
      ++runs.back().rows;
    } else {
      runs.push_back({s.row, 1, s});
    }
  }
  return runs;
}

// Calls `work` with each part of an attention that is a slice: the queries [from, to) over a prompt, causally if they are its own.
template <class Work>
void for_each_slice(const Layout& layout, Work work) {
  for (const auto& run : equal_runs(layout.sequences, false)) {
    if (run.at.prompt > run.at.start) work(run, run.at.start, run.at.prompt, true);
  }
  for (const auto& run : equal_runs(layout.sequences, true)) {
    if (run.at.prompt > run.at.start && run.at.end > run.at.prompt) work(run, run.at.prompt, run.at.end, false);
  }
}

// Positions [from, to) of the rows of a run of t [B, L, heads, ...], as [b, heads, positions, ...].
Tensor slice(const Tensor& t, const Run& run, int64_t from, int64_t to) {
  return t.narrow(0, run.row, run.rows).narrow(1, from, to - from).transpose(1, 2);
}

// t [B, L, ...] as [B * L, ...].
Tensor flat(const Tensor& t) { return t.flatten(0, 1); }

// Rows of t [B, L, heads, d] as padded responses [m, heads, width, d].
Tensor padded(const Tensor& t, const Bucket& bucket) {
  auto rows = flat(t).index_select(0, bucket.gather);
  return rows.unflatten(0, {-1, bucket.width}).transpose(1, 2);
}

// The tokens of padded responses [m, heads, width, ...] as [N, heads, ...].
Tensor tokens_of(const Tensor& t, const Bucket& bucket) { return flat(t.transpose(1, 2)).index_select(0, bucket.real); }

struct Attention : torch::autograd::Function<Attention> {
  // q [B, H, L, d], k and v [B, Hk, L, d]; returns [B, L, H, d]. Padding gets 0.
  static Tensor forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                        const c10::intrusive_ptr<Layout>& layout) {
    const auto operand = [&](const Tensor& t) { return fused::dense_rows(t.transpose(1, 2).to(layout->operands)); };
    const Tensor q = operand(query);
    const Tensor k = operand(key);
    const Tensor v = operand(value);
    const auto accumulation = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const int64_t b = q.size(0);
    const int64_t l = q.size(1);
    const int64_t heads = q.size(2);
    Tensor out = at::zeros({b, l, heads, q.size(3)}, q.options().dtype(accumulation));
    // Nothing attended to: the empty part of a join.
    Tensor lse = at::full({b, l, heads}, -std::numeric_limits<double>::infinity(), out.options());
    for_each_slice(*layout, [&](const Run& run, int64_t from, int64_t to, bool causal) {
      const auto [row, start, prompt, end] = run.at;
      const auto part = fused::forward(slice(q, run, from, to), slice(k, run, start, prompt), slice(v, run, start, prompt), causal);
      slice(out, run, from, to).copy_(part.out);
      slice(lse, run, from, to).copy_(part.lse);
    });
    for (const auto& bucket : layout->buckets) {
      const auto own = fused::forward(padded(q, bucket), padded(k, bucket), padded(v, bucket), true);
      const Tensor own_lse = tokens_of(own.lse, bucket);
      const Tensor prompt_lse = flat(lse).index_select(0, bucket.place);
      const Tensor joined = at::logaddexp(prompt_lse, own_lse);
      const auto share = [&](const Tensor& part) { return (part - joined).exp_().unsqueeze_(-1); };
      const Tensor from_prompt = flat(out).index_select(0, bucket.place).mul_(share(prompt_lse));
      flat(out).index_copy_(0, bucket.place, from_prompt.addcmul_(tokens_of(own.out, bucket).to(accumulation), share(own_lse)));
      flat(lse).index_copy_(0, bucket.place, joined);
    }
    ctx->save_for_backward({q, k, v, out.to(layout->operands), lse});
    ctx->saved_data["layout"] = c10::IValue::make_capsule(layout);
    ctx->saved_data["kind"] = static_cast<int64_t>(query.scalar_type());
    return out.to(query.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    const auto layout = c10::static_intrusive_pointer_cast<Layout>(ctx->saved_data["layout"].toCapsule());
    const auto kind = static_cast<at::ScalarType>(ctx->saved_data["kind"].toInt());
    const Tensor grad = grads[0].to(layout->operands).contiguous();
    const auto sums = lse.options();
    Tensor dq = at::zeros(q.sizes(), sums);
    Tensor dk = at::zeros(k.sizes(), sums);
    Tensor dv = at::zeros(v.sizes(), sums);
    for (const auto& bucket : layout->buckets) {
      // The gradient of padding is 0, whatever its row repeats.
      const Tensor rows = flat(grad).index_select(0, bucket.place);
      const Tensor padded_grad = at::zeros({bucket.gather.size(0), grad.size(2), grad.size(3)}, grad.options())
                                     .index_copy_(0, bucket.real, rows)
                                     .unflatten(0, {-1, bucket.width})
                                     .transpose(1, 2);
      const Tensor own_lse = flat(lse).index_select(0, bucket.gather).unflatten(0, {-1, bucket.width}).transpose(1, 2);
      const auto own =
          fused::backward(padded_grad, padded(q, bucket), padded(k, bucket), padded(v, bucket), padded(out, bucket), own_lse, true);
      flat(dq).index_copy_(0, bucket.place, tokens_of(own.q, bucket).to(sums.dtype()));
      flat(dk).index_copy_(0, bucket.place, tokens_of(own.k, bucket).to(sums.dtype()));
      flat(dv).index_copy_(0, bucket.place, tokens_of(own.v, bucket).to(sums.dtype()));
    }
    for_each_slice(*layout, [&](const Run& run, int64_t from, int64_t to, bool causal) {
      const auto [row, start, prompt, end] = run.at;
      const auto part = fused::backward(slice(grad, run, from, to), slice(q, run, from, to), slice(k, run, start, prompt),
                                        slice(v, run, start, prompt), slice(out, run, from, to), slice(lse, run, from, to), causal);
      slice(dq, run, from, to).add_(part.q);
      slice(dk, run, start, prompt).add_(part.k);
      slice(dv, run, start, prompt).add_(part.v);
    });
    const auto result = [&](const Tensor& t) { return t.transpose(1, 2).to(kind); };
    return {result(dq), result(dk), result(dv), Tensor()};
  }
};

// Refuses shapes and layouts for which the kernels would read outside of their memory.
void check(const Tensor& q, const Tensor& k, const Tensor& v, const Layout& layout) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes(), "shapes ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK(q.size(0) == k.size(0) && q.size(2) == k.size(2) && q.size(3) == k.size(3) && q.size(3) > 0, "queries ", q.sizes(),
              " do not fit keys ", k.sizes());
  TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, q.size(1), " query heads for ", k.size(1), " key heads");
  for (const auto& s : layout.sequences) {
    TORCH_CHECK(0 <= s.row && s.row < q.size(0) && 0 <= s.start && s.start <= s.prompt && s.prompt <= s.end && s.end <= q.size(2),
                "a prompt from ", s.start, " to ", s.prompt, " and responses to ", s.end, " in row ", s.row, " of ", q.sizes());
  }
  for (const auto& bucket : layout.buckets) {
    TORCH_CHECK(bucket.width > 0 && bucket.gather.numel() > 0 && bucket.gather.numel() % bucket.width == 0 &&
                    bucket.real.numel() == bucket.place.numel(),
                "responses of ", bucket.width, " tokens in ", bucket.gather.numel(), " rows");
  }
}

}  // namespace

extern "C" {

// Attention of packed sequences: `cuts` has row, start, end of the prompt and end of the responses for each sequence; `indices` has gather,
// real and place for each bucket, `widths` its width; `operands` is the kernels' dtype as a number of c10::ScalarType.
int unveil_packed_attention(const void* q, const void* k, const void* v, const int64_t* cuts, int64_t sequences,
                            const void* const* indices, const int64_t* widths, int64_t buckets, int operands, void** out, char* message,
                            size_t size) {
  return guarded(message, size, [&] {
    auto layout = c10::make_intrusive<Layout>();
    for (int64_t i = 0; i < sequences; ++i) {
      layout->sequences.push_back({cuts[4 * i], cuts[4 * i + 1], cuts[4 * i + 2], cuts[4 * i + 3]});
    }
    for (int64_t i = 0; i < buckets; ++i) {
      const auto t = tensors_of(indices + 3 * i, 3);
      layout->buckets.push_back({widths[i], t[0], t[1], t[2]});
    }
    layout->operands = static_cast<at::ScalarType>(operands);
    check(tensor_of(q), tensor_of(k), tensor_of(v), *layout);
    *out = new_handle(Attention::apply(tensor_of(q), tensor_of(k), tensor_of(v), layout));
  });
}
}
