// Elements of the three dtypes as vectors of float32, and the product that scores are made of.
//
// Two vectors of elements are read at a time, in whatever order is cheapest: bfloat16 leaves the even elements in the
// first vector and the odd ones in the second (a shift and a mask, where order would take shuffles). Everything between
// the cache and the output keeps that order: queries, tiles, accumulators.
#pragma once

#include <string.h>

#include "problem.h"

namespace hal_cpu {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kPair = 2 * kLanes;  // elements read at a time; rows are padded to whole pairs

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

inline void load_pair(const Bf16* p, V x[2]) { load_bf16(&p->bits, x); }
inline void load_pair(const F16* p, V x[2]) {
  x[0] = load_f16(&p->bits);
  x[1] = load_f16(&p->bits + kLanes);
}
inline void load_pair(const float* p, V x[2]) {
  x[0] = load(p);
  x[1] = load(p + kLanes);
}
inline void store_pair(Bf16* p, V a, V b) { store_bf16(&p->bits, a, b); }
inline void store_pair(F16* p, V a, V b) {
  store_f16(&p->bits, a);
  store_f16(&p->bits + kLanes, b);
}
inline void store_pair(float* p, V a, V b) {
  store(p, a);
  store(p + kLanes, b);
}

// Scales an accumulator row, padded to whole pairs, and writes n elements.
template <class T>
inline void narrow_row(const float* from, float factor, T* to, int n) {
  const V by = splat(factor);
  for (int i = 0; i < n; i += kPair) {
    const V a = load(from + i) * by, b = load(from + i + kLanes) * by;
    if (i + kPair <= n) {
      store_pair(to + i, a, b);
    } else {
      T rest[kPair];
      store_pair(rest, a, b);
      memcpy(to + i, rest, (n - i) * sizeof(T));
    }
  }
}

// Copies n elements and pads them with zeros to whole pairs.
template <class T>
inline void pad_row(const T* from, T* to, int n) {
  memcpy(to, from, n * sizeof(T));
  memset((void*)(to + n), 0, (round_up(n, kPair) - n) * sizeof(T));
}

// How scores of one dtype are multiplied: in words of 32 bits, kVectors vectors of them for a pair of elements. Here a
// word is one element as float32.
template <class T>
struct Product {
  using Value = float;  // what unpacked values are
  static constexpr int kVectors = 2;
  static void load_words(const T* p, V x[kVectors]) { load_pair(p, x); }
  static V add(V a, V b, V sum) { return fma(a, b, sum); }
};

#ifdef __AVX512BF16__
// The processor multiplies bfloat16 itself: a word is two neighbouring elements as they are in memory, and one
// instruction adds both their products. It takes subnormal numbers for zero.
template <>
struct Product<Bf16> {
  using Value = Bf16;
  static constexpr int kVectors = 1;
  static void load_words(const Bf16* p, V x[kVectors]) { x[0] = load((const float*)p); }
  static V add(V a, V b, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

template <class T>
constexpr bool kWidens = Product<T>::kVectors == 2;  // whether words are float32

// Words of a row, and from one row to the next: an odd number of cache lines, which spreads rows over all sets of the
// first-level cache.
template <class T>
inline int word_count(int dim) {
  return round_up(dim, kPair) / 2 * Product<T>::kVectors;
}
template <class T>
constexpr int kWordStride = kWidens<T> ? kTileStride : kMaxDim / 2 + 16;

// A row as words, padded with zeros. Never reads past the row: it may end the allocation.
template <class T>
inline void unpack_row(const T* from, float* words, int n) {
  V x[Product<T>::kVectors];
  for (int i = 0; i < n; i += kPair) {
    if (i + kPair <= n) {
      Product<T>::load_words(from + i, x);
    } else {
      T rest[kPair];
      pad_row(from + i, rest, n - i);
      Product<T>::load_words(rest, x);
    }
#pragma GCC unroll 2
    for (int v = 0; v < Product<T>::kVectors; ++v, words += kLanes) store(words, x[v]);
  }
}

}  // namespace
}  // namespace hal_cpu
