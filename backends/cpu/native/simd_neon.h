// NEON of every aarch64 processor: 4 lanes, 32 registers.
#pragma once

#include <arm_neon.h>

#include "problem.h"

namespace hal_cpu {
namespace {

using V = float32x4_t;
constexpr int kLanes = 4;
constexpr int kRegisters = 32;

inline V load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, V v) { vst1q_f32(p, v); }
inline V splat(float x) { return vdupq_n_f32(x); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline V select_less(V a, V b, V x, V y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
inline V select_equal(V a, V b, V x, V y) { return vbslq_f32(vceqq_f32(a, b), x, y); }
// 2 to the integer in the low mantissa bits of z.
inline V exponent(V z) {
  return vreinterpretq_f32_u32(vaddq_u32(vshlq_n_u32(vreinterpretq_u32_f32(z), 23), vdupq_n_u32(127u << 23)));
}

inline float sum_lanes(V v) { return vaddvq_f32(v); }

inline float max_lanes(V v) { return vmaxvq_f32(v); }

// to[i] = sum_lanes of the i-th.
inline void sum_lanes4(V a, V b, V c, V d, float* to) {
  vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

// a0 b0 a1 b1 of the lower or upper halves.
inline V interleave_low(V a, V b) { return vzip1q_f32(a, b); }
inline V interleave_high(V a, V b) { return vzip2q_f32(a, b); }

// Even elements, then odd ones.
inline void load_bf16(const uint16_t* p, V x[2]) {
  const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(p));
  x[0] = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
  x[1] = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)));
}
inline V load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

// Rounded to nearest even, in the upper half of each lane.
inline uint32x4_t round_bf16(V v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
}
inline void store_bf16(uint16_t* p, V even, V odd) {
  const uint32x4_t both = vsriq_n_u32(round_bf16(odd), round_bf16(even), 16);
  vst1q_u16(p, vreinterpretq_u16_u32(both));
}
inline void store_f16(uint16_t* p, V v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

}  // namespace
}  // namespace hal_cpu
