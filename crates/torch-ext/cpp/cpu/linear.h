// y = x W^T for few rows x: W is read in place, row by row, once for all rows of x.
#pragma once

#include "vec.h"

// Rows of W in one unit of work.
constexpr int64_t BLOCK = 24;

// Computes out[i * N + j] = dot(x_i, w_j) for M rows x and N rows w of length k.
template <int M, int N>
INLINE void dots(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t k, float* out) {
  vec acc[M][N] = {};
  auto accumulate = [&](auto load_at) {
    vec b[N];
    for (int j = 0; j < N; j++) b[j] = load_at(w + j * ldw);
    for (int i = 0; i < M; i++) {
      const vec a = load_at(x + i * ldx);
      for (int j = 0; j < N; j++) acc[i][j] = fma(a, b[j], acc[i][j]);
    }
  };
  int64_t at = 0;
  for (; at + W <= k; at += W) accumulate([&](const float* p) { return load(p + at); });
  if (at < k) accumulate([&](const float* p) { return load(p + at, k - at); });
  // Always in groups of four, so that the order of a sum, and so its rounding, does not depend on the number of rows.
  constexpr int ALL = M * N;
  const vec* flat = &acc[0][0];
  for (int o = 0; o < ALL; o += 4) {
    auto part = [&](int i) { return o + i < ALL ? flat[o + i] : vec{}; };
    const vec4 s = sum4(part(0), part(1), part(2), part(3));
    std::memcpy(out + o, &s, sizeof(float) * (ALL - o < 4 ? ALL - o : 4));
  }
}

// Computes y[i * ldy + j] for all `rows` of x and N rows w; overwrites `y`, or adds to it.
template <int N>
INLINE void column(const float* x, int64_t rows, int64_t k, const float* w, const float* bias, float* y, int64_t ldy,
                   bool add) {
  float out[4 * N];
  auto write = [&](int64_t at, int m) {
    for (int i = 0; i < m; i++)
      for (int j = 0; j < N; j++) {
        float& target = y[(at + i) * ldy + j];
        target = out[i * N + j] + (bias ? bias[j] : 0.0f) + (add ? target : 0.0f);
      }
  };
  int64_t at = 0;
  for (; at + 4 <= rows; at += 4) {
    dots<4, N>(x + at * k, k, w, k, k, out);
    write(at, 4);
  }
  for (; at < rows; at++) {
    dots<1, N>(x + at * k, k, w, k, k, out);
    write(at, 1);
  }
}

// Computes columns [from, to) of y [rows, .] = x [rows, k] W^T (+ bias); W [., k].
static void columns(const float* x, int64_t rows, int64_t k, const float* w, const float* bias, float* y, int64_t ldy,
                    int64_t from, int64_t to, bool add) {
  int64_t j = from;
  for (; j + 3 <= to; j += 3) column<3>(x, rows, k, w + j * k, bias ? bias + j : nullptr, y + j, ldy, add);
  for (; j < to; j++) column<1>(x, rows, k, w + j * k, bias ? bias + j : nullptr, y + j, ldy, add);
}
