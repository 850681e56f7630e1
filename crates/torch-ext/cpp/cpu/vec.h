// Float vectors as wide as the instruction set that this is compiled for, in GCC's and Clang's portable notation. On x86 the compiler
// must not fuse products and sums on its own (-ffp-contract=off): whether it does depends on how a loop is unrolled, and so on the
// number of rows. Fused operations are written as `fma`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(UNVEIL_LANES)
constexpr int W = UNVEIL_LANES;
#elif defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// Loads `count` numbers, followed by zeros.
INLINE vec load(const float* p, int64_t count) {
  vec v = {};
  for (int64_t i = 0; i < count; i++) v[i] = p[i];
  return v;
}

INLINE vec splat(float x) { return x - vec{}; }

// a * b + c, rounded once if the instruction set can.
INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  static_assert(W == 16);
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[W / 8], y[W / 8], z[W / 8];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int i = 0; i < W / 8; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
#else
  // On other processors the compiler may fuse (see build.rs), since it lowers vectors that are wider than the processor's.
  return a * b + c;
#endif
}

INLINE vec max(vec a, vec b) { return a > b ? a : b; }

INLINE vec8 halves(vec v) {
  vec8 h[W / 8];
  std::memcpy(h, &v, sizeof v);
  if constexpr (W == 16) return h[0] + h[1];
  return h[0];
}

// Sums of the lanes of four vectors.
INLINE vec4 sum4(vec a, vec b, vec c, vec d) {
  typedef int32_t pick __attribute__((vector_size(32)));
  const vec8 p = halves(a), q = halves(b), r = halves(c), s = halves(d);
  const pick even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
  const vec8 pq = __builtin_shuffle(p, q, even) + __builtin_shuffle(p, q, odd);
  const vec8 rs = __builtin_shuffle(r, s, even) + __builtin_shuffle(r, s, odd);
  const pick low = {0, 1, 8, 9, 4, 5, 12, 13}, high = {2, 3, 10, 11, 6, 7, 14, 15};
  const vec8 sums = __builtin_shuffle(pq, rs, low) + __builtin_shuffle(pq, rs, high);
  vec4 h[2];
  std::memcpy(h, &sums, sizeof sums);
  return h[0] + h[1];
}

INLINE float sum(vec v) {
  float out = 0;
  for (int i = 0; i < W; i++) out += v[i];
  return out;
}

// e^x within two units of the last place; 0 below -87.
INLINE vec exp(vec x) {
  const vec in = max(x, splat(-87.3f));
  const vec big = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const vec whole = fma(in, splat(1.44269504f), big) - big;
  const vec f = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), in));
  vec p = splat(1.9875691500e-4f);
  p = fma(p, f, splat(1.3981999507e-3f));
  p = fma(p, f, splat(8.3334519073e-3f));
  p = fma(p, f, splat(4.1665795894e-2f));
  p = fma(p, f, splat(1.6666665459e-1f));
  p = fma(p, f, splat(5.0000001201e-1f));
  p = fma(p * f, f, f) + 1.0f;
  ivec power = __builtin_convertvector(whole, ivec);
  power = (power + 127) << 23;
  vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  const vec out = p * scale;
  return x < splat(-87.3f) ? vec{} : out;
}
