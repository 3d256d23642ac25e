// Sums of bfloat16 rows in bfloat16, the common case of combine, in even and odd elements.
//
// A register of bfloat16 pairs holds its odd elements as float32 once the lower halves are cleared, and its even ones
// once shifted: no widening in order is needed, and the two sums of a pair are joined by one blend. What is computed is
// exactly what kernels.cpp writes for one element. Blocks with a NaN in them are left to it.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define HAL_AVX2 __attribute__((target("avx2,f16c")))
#define HAL_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,prefer-vector-width=512")))

namespace hal_ep {

constexpr size_t kPairBlock512 = 32, kPairBlock256 = 16;

// Columns summed, from the first on: a multiple of the block, or fewer where a block has a NaN.
HAL_AVX512 inline size_t sum_pairs_avx512(uint16_t* out, const void* const* rows, const float* weights, int count,
                                          size_t from, size_t columns) {
  const __m512i high = _mm512_set1_epi32(int(0xFFFF0000u)), half = _mm512_set1_epi32(0x7FFF);
  const __m512i one = _mm512_set1_epi32(1);
  size_t at = from;
  for (; at + kPairBlock512 <= columns; at += kPairBlock512) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int r = 0; r < count; ++r) {
      const __m512i pairs = _mm512_loadu_si512(static_cast<const uint16_t*>(rows[r]) + at);
      __m512 e = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      __m512 o = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
      if (weights != nullptr) {
        const __m512 weight = _mm512_set1_ps(weights[r]);
        e = _mm512_mul_ps(weight, e), o = _mm512_mul_ps(weight, o);
      }
      even = _mm512_add_ps(even, e), odd = _mm512_add_ps(odd, o);
    }
    if (_mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q) != 0) return at;
    __m512i e = _mm512_castps_si512(even), o = _mm512_castps_si512(odd);
    const __m512i e_up = _mm512_srli_epi32(e, 16);
    e = _mm512_add_epi32(_mm512_add_epi32(e, half), _mm512_and_si512(e_up, one));
    o = _mm512_add_epi32(_mm512_add_epi32(o, half), _mm512_and_si512(_mm512_srli_epi32(o, 16), one));
    const __m512i joined = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(e, 16), o);
    _mm512_storeu_si512(out + at, joined);
  }
  return at;
}

HAL_AVX2 inline size_t sum_pairs_avx2(uint16_t* out, const void* const* rows, const float* weights, int count,
                                      size_t from, size_t columns) {
  const __m256i high = _mm256_set1_epi32(int(0xFFFF0000u)), half = _mm256_set1_epi32(0x7FFF);
  const __m256i one = _mm256_set1_epi32(1);
  size_t at = from;
  for (; at + kPairBlock256 <= columns; at += kPairBlock256) {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    for (int r = 0; r < count; ++r) {
      const __m256i pairs =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(rows[r]) + at));
      __m256 e = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      __m256 o = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));
      if (weights != nullptr) {
        const __m256 weight = _mm256_set1_ps(weights[r]);
        e = _mm256_mul_ps(weight, e), o = _mm256_mul_ps(weight, o);
      }
      even = _mm256_add_ps(even, e), odd = _mm256_add_ps(odd, o);
    }
    if (_mm256_movemask_ps(_mm256_cmp_ps(even, odd, _CMP_UNORD_Q)) != 0) return at;
    __m256i e = _mm256_castps_si256(even), o = _mm256_castps_si256(odd);
    e = _mm256_add_epi32(_mm256_add_epi32(e, half), _mm256_and_si256(_mm256_srli_epi32(e, 16), one));
    o = _mm256_add_epi32(_mm256_add_epi32(o, half), _mm256_and_si256(_mm256_srli_epi32(o, 16), one));
    const __m256i joined = _mm256_blend_epi16(_mm256_srli_epi32(e, 16), o, 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), joined);
  }
  return at;
}

}  // namespace hal_ep
