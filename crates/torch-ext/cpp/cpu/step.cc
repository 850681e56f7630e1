// A decode step on the CPU: one token per fed row, attending to the row's own keys and values and to the prefix that its group
// shares. All layers run in one team of threads; weights are read in place. The types are mirrored in src/cpu_kernels.rs.

#include "attention.h"
#include "linear.h"

extern "C" {

// Weights of a layer, row-major; null for a tensor that the model family lacks.
struct Layer {
  const float *norm1, *qkv[3], *qkv_bias[3], *q_norm, *k_norm, *o, *norm2, *gate, *up, *down;
  // Keys and values: prefixes [S, Hkv, prompt, d], suffixes [R, Hkv, response, d].
  const float *prefix_k, *prefix_v;
  float *suffix_k, *suffix_v;
  // If attention is captured: image keys [S, Hkv, images, d] and, for each head, whether it is captured.
  const float* image_k;
  const uint8_t* heads;
};

struct Step {
  int64_t fed, hidden, intermediate, heads, kv_heads, head_dim, slots, n, prompt, response, images;
  float eps, head_weight;
  int32_t threads;
  // [fed, hidden], in and out.
  float* x;
  // [fed, head_dim / 2].
  const float *cos, *sin;
  // Cache row of each fed token, ascending, and the response tokens that the row already holds.
  const int64_t *row, *length;
  // Per slot: prompt tokens, image tokens.
  const int64_t *prefix, *image;
  // [Hkv, fed, images], zeros to which rows are added; null without capture.
  float* attention;
};
}

namespace {

void rms_norm(const float* x, const float* w, int64_t d, float eps, float* out) {
  vec acc = {};
  int64_t at = 0;
  for (; at + W <= d; at += W) acc = fma(load(x + at), load(x + at), acc);
  if (at < d) acc = fma(load(x + at, d - at), load(x + at, d - at), acc);
  const float scale = 1.0f / std::sqrt(sum(acc) / static_cast<float>(d) + eps);
  for (int64_t i = 0; i < d; i++) out[i] = x[i] * scale * w[i];
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = fma(a, cos[i], -(b * sin[i]));
    x[i + half] = fma(b, cos[i], a * sin[i]);
  }
}

// Softmax over the image keys for each captured lane, times the head weight, added to that query's row.
void capture_attention(const Step& s, const Layer& l, const Queries& queries, int64_t slot, int64_t kv, int64_t first) {
  thread_local std::vector<float> raw;
  const int64_t count = s.image[slot], group = s.heads / s.kv_heads, lanes = queries.lanes;
  if (count == 0) return;
  raw.resize(count * lanes);
  scores(queries, l.image_k + (slot * s.kv_heads + kv) * s.images * s.head_dim, count, raw.data());
  for (int64_t at = 0; at < lanes; at += W) {
    vec top = splat(-std::numeric_limits<float>::infinity()), total = {};
    for (int64_t j = 0; j < count; j++) top = max(top, load(&raw[j * lanes + at]));
    for (int64_t j = 0; j < count; j++) {
      const vec e = exp(load(&raw[j * lanes + at]) - top);
      total += e;
      store(&raw[j * lanes + at], e);
    }
    const vec scale = s.head_weight / total;
    for (int64_t j = 0; j < count; j++) store(&raw[j * lanes + at], load(&raw[j * lanes + at]) * scale);
  }
  int64_t end = first;
  while (end < s.fed && s.row[end] / s.n == slot) end++;
  for (int64_t a = first; a < end; a++) {
    float* out = s.attention + (kv * s.fed + a) * s.images;
    for (int64_t g = 0; g < group; g++) {
      if (l.heads && !l.heads[kv * group + g]) continue;
      const float* lane = &raw[(a - first) * group + g];
      for (int64_t j = 0; j < count; j++) out[j] += lane[j * lanes];
    }
  }
}

// One key/value head of one slot: rotates its queries and keys, stores keys and values, computes attention. `qkv` is
// [fed, Hq + 2 Hkv, d], `out` [fed, Hq, d].
void group_attention(const Step& s, const Layer& l, int64_t slot, int64_t kv, float* qkv, float* out) {
  thread_local Queries shared, own;
  const int64_t d = s.head_dim, group = s.heads / s.kv_heads, width = (s.heads + 2 * s.kv_heads) * d;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const int64_t first = std::lower_bound(s.row, s.row + s.fed, slot * s.n) - s.row;
  const int64_t end = std::lower_bound(s.row + first, s.row + s.fed, (slot + 1) * s.n) - s.row;
  if (first == end) return;
  shared.reset(d, (end - first) * group);
  for (int64_t a = first; a < end; a++) {
    float *q = qkv + a * width + kv * group * d, *k = qkv + a * width + (s.heads + kv) * d;
    const float *cos = s.cos + a * d / 2, *sin = s.sin + a * d / 2, *v = k + s.kv_heads * d;
    for (int64_t g = 0; g < group; g++) {
      if (l.q_norm) rms_norm(q + g * d, l.q_norm, d, s.eps, q + g * d);
      rotate(q + g * d, cos, sin, d / 2);
      shared.set((a - first) * group + g, q + g * d, scale);
    }
    if (l.k_norm) rms_norm(k, l.k_norm, d, s.eps, k);
    rotate(k, cos, sin, d / 2);
    const int64_t offset = ((s.row[a] * s.kv_heads + kv) * s.response + s.length[a]) * d;
    std::copy(k, k + d, l.suffix_k + offset);
    std::copy(v, v + d, l.suffix_v + offset);
  }
  if (l.image_k) capture_attention(s, l, shared, slot, kv, first);
  const int64_t prefix = (slot * s.kv_heads + kv) * s.prompt * d;
  attend(shared, l.prefix_k + prefix, l.prefix_v + prefix, s.prefix[slot]);
  for (int64_t a = first; a < end; a++) {
    own.reset(d, group);
    for (int64_t g = 0; g < group; g++) own.set(g, qkv + a * width + (kv * group + g) * d, scale);
    const int64_t suffix = (s.row[a] * s.kv_heads + kv) * s.response * d;
    attend(own, l.suffix_k + suffix, l.suffix_v + suffix, s.length[a] + 1);
    for (int64_t g = 0; g < group; g++)
      merge(shared, (a - first) * group + g, own, g, out + (a * s.heads + kv * group + g) * d);
  }
}

// Columns [from, to) of silu(gate) * up, for all rows of x. Each row starts a new vector, so that the lanes of its columns do not
// depend on the number of rows.
void gated_mlp(const Step& s, const Layer& l, const float* x, int64_t from, int64_t to, float* out) {
  thread_local std::vector<float> buffer;
  const int64_t width = to - from, stride = (width + W - 1) / W * W, count = s.fed * stride;
  buffer.assign(2 * count, 0.0f);
  float *gate = buffer.data(), *up = gate + count;
  columns(x, s.fed, s.hidden, l.gate + from * s.hidden, nullptr, gate, stride, 0, width, false);
  columns(x, s.fed, s.hidden, l.up + from * s.hidden, nullptr, up, stride, 0, width, false);
  for (int64_t i = 0; i < count; i += W) {
    const vec g = load(gate + i);
    store(gate + i, g / (1.0f + exp(-g)) * load(up + i));
  }
  for (int64_t a = 0; a < s.fed; a++)
    std::copy(gate + a * stride, gate + a * stride + width, out + a * s.intermediate + from);
}

}  // namespace

extern "C" {

// y [rows, n] = x [rows, k] W^T (+ bias), W [n, k].
void unveil_linear(const float* x, int64_t rows, int64_t k, const float* w, int64_t n, const float* bias, float* y,
                   int32_t threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t at = 0; at < n; at += BLOCK) columns(x, rows, k, w, bias, y, n, at, std::min(n, at + BLOCK), false);
}

void unveil_decode(const Step* step, const Layer* layers, int64_t count) {
  const Step& s = *step;
  const int64_t d = s.head_dim, width = (s.heads + 2 * s.kv_heads) * d, inner = s.heads * d;
  const int64_t parts[3] = {inner, s.kv_heads * d, s.kv_heads * d};
  std::vector<float> normed(s.fed * s.hidden), qkv(s.fed * width), attended(s.fed * inner), mlp(s.fed * s.intermediate);
  // Work is scheduled block by block, since threads may lose their core for a while; each loop ends with a barrier.
#pragma omp parallel num_threads(s.threads)
  for (int64_t index = 0; index < count; index++) {
    const Layer& l = layers[index];
#pragma omp for schedule(static)
    for (int64_t a = 0; a < s.fed; a++)
      rms_norm(s.x + a * s.hidden, l.norm1, s.hidden, s.eps, &normed[a * s.hidden]);
    int64_t at = 0;
    for (int part = 0; part < 3; part++) {
#pragma omp for schedule(dynamic) nowait
      for (int64_t j = 0; j < parts[part]; j += BLOCK)
        columns(normed.data(), s.fed, s.hidden, l.qkv[part], l.qkv_bias[part], &qkv[at], width, j,
                std::min(parts[part], j + BLOCK), false);
      at += parts[part];
    }
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.slots * s.kv_heads; task++)
      group_attention(s, l, task / s.kv_heads, task % s.kv_heads, qkv.data(), attended.data());
#pragma omp for schedule(dynamic)
    for (int64_t j = 0; j < s.hidden; j += BLOCK)
      columns(attended.data(), s.fed, inner, l.o, nullptr, s.x, s.hidden, j, std::min(s.hidden, j + BLOCK), true);
#pragma omp for schedule(static)
    for (int64_t a = 0; a < s.fed; a++)
      rms_norm(s.x + a * s.hidden, l.norm2, s.hidden, s.eps, &normed[a * s.hidden]);
#pragma omp for schedule(dynamic)
    for (int64_t j = 0; j < s.intermediate; j += BLOCK)
      gated_mlp(s, l, normed.data(), j, std::min(s.intermediate, j + BLOCK), mlp.data());
#pragma omp for schedule(dynamic)
    for (int64_t j = 0; j < s.hidden; j += BLOCK)
      columns(mlp.data(), s.fed, s.intermediate, l.down, nullptr, s.x, s.hidden, j, std::min(s.hidden, j + BLOCK), true);
  }
}
}
