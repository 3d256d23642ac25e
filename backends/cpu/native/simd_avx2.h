// AVX2 with FMA and F16C: 8 lanes, 16 registers.
#pragma once

#include <immintrin.h>

#include "problem.h"

namespace hal_cpu {
namespace {

using V = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V splat(float x) { return _mm256_set1_ps(x); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand if either is NaN.
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V select_less(V a, V b, V x, V y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline V select_equal(V a, V b, V x, V y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
// 2 to the integer in the low mantissa bits of z.
inline V exponent(V z) {
  const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(z), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(127 << 23)));
}

inline float sum_lanes(V v) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

inline float max_lanes(V v) {
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

// to[i] = sum_lanes of the i-th.
inline void sum_lanes4(V a, V b, V c, V d, float* to) {
  const V ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const V cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const V all = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

// a0 b0 a1 b1 … of the lower or upper halves.
inline V interleave_low(V a, V b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
inline V interleave_high(V a, V b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

// Even elements, then odd ones.
inline void load_bf16(const uint16_t* p, V x[2]) {
  const __m256i words = _mm256_loadu_si256((const __m256i*)p);
  x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  x[1] = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
}
inline V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

// Rounded to nearest even, in the upper half of each lane.
inline __m256i round_bf16(V v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
}
inline void store_bf16(uint16_t* p, V even, V odd) {
  const __m256i low = _mm256_srli_epi32(round_bf16(even), 16);
  _mm256_storeu_si256((__m256i*)p, _mm256_blend_epi16(low, round_bf16(odd), 0xaa));
}
inline void store_f16(uint16_t* p, V v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace hal_cpu
