// y = x W^T for few rows x: W is read where it lies, row by row, once for all rows of x.
#pragma once

#include "vec.h"

// Rows of W that one unit of work takes.
constexpr int64_t BLOCK = 24;

// out[i * N + j] = dot(x_i, w_j) for M rows x and N rows w of length k.
template <int M, int N>
INLINE void dots(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t k, float* out) {
  vec acc[M][N] = {};
  auto round = [&](auto some) {
    vec b[N];
    for (int j = 0; j < N; j++) b[j] = some(w + j * ldw);
    for (int i = 0; i < M; i++) {
      const vec a = some(x + i * ldx);
      for (int j = 0; j < N; j++) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  };
  int64_t at = 0;
  for (; at + W <= k; at += W) round([&](const float* p) { return load(p + at); });
  if (at < k) round([&](const float* p) { return load(p + at, k - at); });
  // Always in fours, so that a sum's order, and so its rounding, does not depend on how many rows there are.
  constexpr int ALL = M * N;
  const vec* flat = &acc[0][0];
  for (int o = 0; o < ALL; o += 4) {
    auto part = [&](int i) { return o + i < ALL ? flat[o + i] : vec{}; };
    const vec4 s = sum4(part(0), part(1), part(2), part(3));
    std::memcpy(out + o, &s, sizeof(float) * (ALL - o < 4 ? ALL - o : 4));
  }
}

// y[i * ldy + j] for all `rows` of x and N rows w; `y` is overwritten, or added to.
template <int N>
INLINE void column(const float* x, int64_t rows, int64_t k, const float* w, const float* bias, float* y, int64_t ldy,
                   bool add) {
  float out[4 * N];
  auto keep = [&](int64_t at, int m) {
    for (int i = 0; i < m; i++)
      for (int j = 0; j < N; j++) {
        float& target = y[(at + i) * ldy + j];
        target = out[i * N + j] + (bias ? bias[j] : 0.0f) + (add ? target : 0.0f);
      }
  };
  int64_t at = 0;
  for (; at + 4 <= rows; at += 4) {
    dots<4, N>(x + at * k, k, w, k, k, out);
    keep(at, 4);
  }
  for (; at < rows; at++) {
    dots<1, N>(x + at * k, k, w, k, k, out);
    keep(at, 1);
  }
}

// Columns [from, to) of y [rows, .] = x [rows, k] W^T (+ bias); W [., k].
static void columns(const float* x, int64_t rows, int64_t k, const float* w, const float* bias, float* y, int64_t ldy,
                    int64_t from, int64_t to, bool add) {
  int64_t j = from;
  for (; j + 3 <= to; j += 3) column<3>(x, rows, k, w + j * k, bias ? bias + j : nullptr, y + j, ldy, add);
  for (; j < to; j++) column<1>(x, rows, k, w + j * k, bias ? bias + j : nullptr, y + j, ldy, add);
}
