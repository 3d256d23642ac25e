// The baseline: the compiler's own 4-lane vectors, whatever the processor (SSE2 on x86-64).
#pragma once

#include <string.h>

#include "problem.h"

namespace hal_cpu {
namespace {

typedef float V __attribute__((vector_size(16)));
typedef uint32_t VI __attribute__((vector_size(16)));
typedef uint16_t VH __attribute__((vector_size(8)));
constexpr int kLanes = 4;
constexpr int kRegisters = 16;

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
inline V splat(float x) { return V{x, x, x, x}; }
inline V fma(V a, V b, V c) { return a * b + c; }
// The second operand if either is NaN.
inline V max(V a, V b) { return a > b ? a : b; }
inline V select_less(V a, V b, V x, V y) { return a < b ? x : y; }
inline V select_equal(V a, V b, V x, V y) { return a == b ? x : y; }
// 2 to the integer in the low mantissa bits of z.
inline V exponent(V z) { return (V)(((VI)z << 23) + (127u << 23)); }

inline float sum_lanes(V v) { return (v[0] + v[1]) + (v[2] + v[3]); }

inline float max_lanes(V v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}

// to[i] = sum_lanes of the i-th.
inline void sum_lanes4(V a, V b, V c, V d, float* to) {
  to[0] = sum_lanes(a), to[1] = sum_lanes(b), to[2] = sum_lanes(c), to[3] = sum_lanes(d);
}

// a0 b0 a1 b1 of the lower or upper halves.
inline V interleave_low(V a, V b) { return V{a[0], b[0], a[1], b[1]}; }
inline V interleave_high(V a, V b) { return V{a[2], b[2], a[3], b[3]}; }

inline VI widen(const uint16_t* p) { return VI{p[0], p[1], p[2], p[3]}; }
inline void narrow(uint16_t* p, VI v) {
  for (int i = 0; i < kLanes; ++i) p[i] = (uint16_t)v[i];
}

// The first four elements, then the next.
inline void load_bf16(const uint16_t* p, V x[2]) {
  x[0] = (V)(widen(p) << 16);
  x[1] = (V)(widen(p + kLanes) << 16);
}

// A half's bits moved up and scaled by 2^112 are its value, subnormals included; infinity and NaN need their exponent.
inline V load_f16(const uint16_t* p) {
  const VI bits = widen(p);
  const VI sign = (bits & 0x8000) << 16;
  const VI magnitude = (bits & 0x7fff) << 13;
  const VI finite = (VI)((V)magnitude * splat(0x1p112f));
  const VI special = magnitude | 0x7f800000;
  return (V)(((bits & 0x7c00) == 0x7c00 ? special : finite) | sign);
}

inline VI round_bf16(V v) {
  const VI bits = (VI)v;
  const VI rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (v == v ? rounded : bits | 0x400000) >> 16;
}
inline void store_bf16(uint16_t* p, V first, V second) {
  narrow(p, round_bf16(first));
  narrow(p + kLanes, round_bf16(second));
}

inline void store_f16(uint16_t* p, V v) {
  const VI bits = (VI)v;
  const VI sign = (bits >> 16) & 0x8000;
  const VI magnitude = bits & 0x7fffffff;
  // Normal halves: round to nearest even at bit 13, then move the exponent's bias. Overflow carries into infinity.
  const VI normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
  // Subnormal halves: adding 0.5 lets the adder round at 2^-24, the spacing of floats at 0.5.
  const VI tiny = (VI)((V)magnitude + splat(0.5f)) - 0x3f000000;
  VI half = magnitude < 0x38800000 ? tiny : normal;
  half = magnitude >= 0x47800000 ? VI{0x7c00, 0x7c00, 0x7c00, 0x7c00} : half;
  half = magnitude > 0x7f800000 ? VI{0x7e00, 0x7e00, 0x7e00, 0x7e00} : half;
  narrow(p, half | sign);
}

}  // namespace
}  // namespace hal_cpu
