// Attention of a block of queries over keys. The queries are in the lanes of vectors: a key is read once for all of them, and softmax
// runs within each lane.
#pragma once

#include <algorithm>
#include <vector>

#include "vec.h"

// Number of keys that are scored before their values are read.
constexpr int64_t TILE = 64;

// Scaled queries `[d][lanes]` and the state of their online softmax: maxima, sums of exponentials, weighted values `[d][lanes]`.
struct Queries {
  int64_t d, lanes;
  std::vector<float> q, max, sum, out;

  void reset(int64_t dim, int64_t count) {
    d = dim;
    lanes = (count + W - 1) / W * W;
    q.assign(d * lanes, 0.0f);
    max.assign(lanes, -std::numeric_limits<float>::infinity());
    sum.assign(lanes, 0.0f);
    out.assign(d * lanes, 0.0f);
  }
  void set(int64_t lane, const float* query, float scale) {
    for (int64_t c = 0; c < d; c++) q[c * lanes + lane] = query[c] * scale;
  }
};

// Computes scores[j * lanes + lane] of K keys `[., d]` for C vectors of queries.
template <int K, int C>
INLINE void score(const float* q, int64_t lanes, const float* keys, int64_t d, float* scores) {
  vec acc[K][C] = {};
  for (int64_t c = 0; c < d; c++) {
    vec a[C];
    for (int i = 0; i < C; i++) a[i] = load(q + c * lanes + i * W);
    for (int j = 0; j < K; j++)
      for (int i = 0; i < C; i++) acc[j][i] = fma(splat(keys[j * d + c]), a[i], acc[j][i]);
  }
  for (int j = 0; j < K; j++)
    for (int i = 0; i < C; i++) store(scores + j * lanes + i * W, acc[j][i]);
}

template <int C>
INLINE void score_all(const float* q, int64_t lanes, const float* keys, int64_t count, int64_t d, float* scores) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) score<4, C>(q, lanes, keys + j * d, d, scores + j * lanes);
  for (; j < count; j++) score<1, C>(q, lanes, keys + j * d, d, scores + j * lanes);
}

// Adds the values `[count, d]` weighted by `p[j * lanes + lane]`.
template <int C>
INLINE void add_weighted(const float* p, int64_t lanes, const float* values, int64_t count, int64_t d, float* out) {
  auto columns = [&]<int D>(int64_t c) {
    vec acc[D][C];
    for (int e = 0; e < D; e++)
      for (int i = 0; i < C; i++) acc[e][i] = load(out + (c + e) * lanes + i * W);
    for (int64_t j = 0; j < count; j++) {
      vec a[C];
      for (int i = 0; i < C; i++) a[i] = load(p + j * lanes + i * W);
      for (int e = 0; e < D; e++)
        for (int i = 0; i < C; i++) acc[e][i] = fma(splat(values[j * d + c + e]), a[i], acc[e][i]);
    }
    for (int e = 0; e < D; e++)
      for (int i = 0; i < C; i++) store(out + (c + e) * lanes + i * W, acc[e][i]);
  };
  int64_t c = 0;
  for (; c + 4 <= d; c += 4) columns.template operator()<4>(c);
  for (; c < d; c++) columns.template operator()<1>(c);
}

// Computes the scores `[count][lanes]` of keys `[count, d]`.
static void scores(const Queries& s, const float* keys, int64_t count, float* out) {
  int64_t at = 0;
  for (; at + 3 * W <= s.lanes; at += 3 * W) score_all<3>(&s.q[at], s.lanes, keys, count, s.d, out + at);
  if (at + 2 * W == s.lanes) score_all<2>(&s.q[at], s.lanes, keys, count, s.d, out + at);
  if (at + W == s.lanes) score_all<1>(&s.q[at], s.lanes, keys, count, s.d, out + at);
}

// Adds keys and values `[count, d]` to the softmax, tile by tile, with a running maximum (arXiv 1805.02867).
static void attend(Queries& s, const float* keys, const float* values, int64_t count) {
  thread_local std::vector<float> p;
  p.resize(TILE * s.lanes);
  for (int64_t from = 0; from < count; from += TILE) {
    const int64_t tile = std::min(TILE, count - from);
    scores(s, keys + from * s.d, tile, p.data());
    for (int64_t at = 0; at < s.lanes; at += W) {
      const vec before = load(&s.max[at]);
      vec top = before;
      for (int64_t j = 0; j < tile; j++) top = max(top, load(&p[j * s.lanes + at]));
      const vec shrink = exp(before - top);
      vec total = load(&s.sum[at]) * shrink;
      for (int64_t j = 0; j < tile; j++) {
        const vec e = exp(load(&p[j * s.lanes + at]) - top);
        total += e;
        store(&p[j * s.lanes + at], e);
      }
      store(&s.max[at], top);
      store(&s.sum[at], total);
      if (from > 0)
        for (int64_t c = 0; c < s.d; c++) store(&s.out[c * s.lanes + at], load(&s.out[c * s.lanes + at]) * shrink);
    }
    const float* v = values + from * s.d;
    int64_t at = 0;
    for (; at + 3 * W <= s.lanes; at += 3 * W) add_weighted<3>(&p[at], s.lanes, v, tile, s.d, &s.out[at]);
    if (at + 2 * W == s.lanes) add_weighted<2>(&p[at], s.lanes, v, tile, s.d, &s.out[at]);
    if (at + W == s.lanes) add_weighted<1>(&p[at], s.lanes, v, tile, s.d, &s.out[at]);
  }
}

// Merges lane i of `a` and lane j of `b` into one attention output `[d]`, by their maxima and sums (Hydragen, arXiv 2402.05099,
// section 3.1).
static void merge(const Queries& a, int64_t i, const Queries& b, int64_t j, float* out) {
  const float top = std::max(a.max[i], b.max[j]);
  const float wa = std::exp(a.max[i] - top), wb = std::exp(b.max[j] - top);
  const float total = 1.0f / fma(a.sum[i], wa, b.sum[j] * wb);
  for (int64_t c = 0; c < a.d; c++) out[c] = fma(a.out[c * a.lanes + i], wa, b.out[c * b.lanes + j] * wb) * total;
}
