// The exponential of the softmax.
#pragma once

#include "elements.h"

namespace hal_cpu {
namespace {

// 2^x for x <= 0: at most 1.2 half units in the last place, exact at 0, 0 from -127 down, NaN kept.
inline V exp2(V x) {
  const V magic = splat(0x1.8p23f);  // adding it leaves the rounded integer in the low mantissa bits
  x = max(splat(-127.0f), x);
  const V z = x + magic;
  const V f = x - (z - magic);
  V y = splat(0x1.44138ap-13f);
  y = fma(y, f, splat(0x1.5f0890p-10f));
  y = fma(y, f, splat(0x1.3b2a54p-7f));
  y = fma(y, f, splat(0x1.c6af6cp-5f));
  y = fma(y, f, splat(0x1.ebfbe0p-3f));
  y = fma(y, f, splat(0x1.62e430p-1f));
  y = fma(y, f, splat(1.0f));
  return y * exponent(z);
}

// A maximum to subtract: 0 stands for -inf, whose difference with itself would be NaN.
inline V finite_max(V m) { return select_equal(m, splat(-kInfinity), splat(0.0f), m); }

inline float lane(V v, int i) {
  float all[kLanes];
  store(all, v);
  return all[i];
}

inline float exp2(float x) { return lane(exp2(splat(x)), 0); }

}  // namespace
}  // namespace hal_cpu
