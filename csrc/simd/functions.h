// Functions of vectors. Polynomials are minimax fits, their errors stated.
#pragma once

#include "vector.h"

namespace dmd2_fast::DMD2_FAST_ISA {

// x where it lies between the two, else the nearer one; NaN stays NaN.
inline Vector bounded(Vector x, Vector low, Vector high) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)low, _mm512_min_ps((__m512)high, (__m512)x));
#elif defined(__AVX2__)
  return (Vector)_mm256_max_ps((__m256)low, _mm256_min_ps((__m256)high, (__m256)x));
#elif defined(__SSE2__)
  return (Vector)_mm_max_ps((__m128)low, _mm_min_ps((__m128)high, (__m128)x));
#else
  return x < low ? low : (x > high ? high : x);
#endif
}

// exp(x) to 1.5e-7 relative for x in [-87.6, 88.3]; below that at most 1e-38, above infinity; NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector within = bounded(x, all(-88.0f), all(89.0f));  // the scale of 89 is infinite
  const Vector shifted = fused(within, all(1.44269504f), all(12582912.0f));  // 1.5 * 2^23: rounds to an integer
  const Vector whole = shifted - 12582912.0f;
  Vector rest = fused(whole, all(-0.693145751953125f), within);
  rest = fused(whole, all(-1.42860677e-6f), rest);
  Vector y = all(1.38145394e-3f);  // (exp(r) - 1 - r) / r^2, so that the last additions are the smallest roundings
  y = fused(y, rest, all(8.36874545e-3f));
  y = fused(y, rest, all(4.1668389e-2f));
  y = fused(y, rest, all(0.166665211f));
  y = fused(y, rest, all(0.49999994f));
  y = 1.0f + fused(y, rest * rest, rest);
#if defined(__AVX512F__)
  return (Vector)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
  return y * (Vector)(((Words)shifted << 23) + 0x3F800000u);
#endif
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

inline Vector silu(Vector x) { return x / (1.0f + exponential(-x)); }

// silu(x), its derivative through `slope`.
inline Vector silu(Vector x, Vector* slope) {
  const Vector gate = sigmoid(x), value = x * gate;
  *slope = gate + value * (1.0f - gate);
  return value;
}

// log(1 + exp(x)) to 2e-7 relative: max(x, 0) + log(1 + e), e = exp(-|x|), the logarithm as 2 artanh(e / (2 + e)).
inline Vector softplus(Vector x) {
  const Vector e = exponential(-absolute(x));
  const Vector ratio = e / (2.0f + e), square = ratio * ratio;
  Vector y = all(2.0f / 15.0f);
  y = fused(y, square, all(2.0f / 13.0f));
  y = fused(y, square, all(2.0f / 11.0f));
  y = fused(y, square, all(2.0f / 9.0f));
  y = fused(y, square, all(2.0f / 7.0f));
  y = fused(y, square, all(2.0f / 5.0f));
  y = fused(y, square, all(2.0f / 3.0f));
  y = fused(y, square, all(2.0f));
  return fused(y, ratio, x > 0.0f ? x : Vector{});
}

}  // namespace dmd2_fast::DMD2_FAST_ISA
