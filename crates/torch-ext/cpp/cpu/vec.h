// Vectors of floats as wide as the instruction set that this is compiled for, in GCC's and Clang's portable notation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
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

INLINE vec splat(float x) { return x - vec{}; }

INLINE vec max(vec a, vec b) { return a > b ? a : b; }

INLINE vec8 halves(vec v) {
#if defined(__AVX512F__)
  vec8 h[2];
  std::memcpy(h, &v, sizeof v);
  return h[0] + h[1];
#else
  return v;
#endif
}

// The sums of four vectors.
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
  const vec whole = (in * 1.44269504f + big) - big;
  const vec f = (in - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  ivec power = __builtin_convertvector(whole, ivec);
  power = (power + 127) << 23;
  vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  const vec out = p * scale;
  return x < splat(-87.3f) ? vec{} : out;
}
