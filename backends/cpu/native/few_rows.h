// Few query rows: nothing is unpacked or transposed. A handful of tokens is read where it lies, scored by dot products,
// and its values are added while it is still in the first-level cache: K and V come from one read of memory.
#pragma once

#include "cursor.h"
#include "exp2.h"
#include "values.h"

namespace hal_cpu {
namespace {

// Up to so many rows. With more, rows in lanes are cheaper than the sums over lanes that dot products end with.
constexpr int kFewRows = kLanes >= 8 ? 12 : 6;

inline bool few_rows(const Block& b) { return b.all_rows <= kFewRows; }

using FewWeights = Weights<kFewTile, 1>;
constexpr int kDotRows = 4;

// Tokens that share each load of q; enough accumulators to keep the multipliers busy, few enough to stay in registers.
constexpr int dot_tokens(int rows) { return kRegisters == 32 ? (rows == 1 ? 8 : 4) : rows <= 2 ? 4 : 2; }

template <class T>
void pack_few(const Problem& p, const Block& b, float* to) {
  for (int r = 0; r < b.rows; ++r) unpack_row(query_row<T>(p, b, r), to + r * kWordStride<T>, p.head_dim);
}

// Scores of R rows, into S[r][t]. Tokens past `count` repeat the last one.
template <class T, int R>
void score_dots(int dim, int count, const T* const* tokens, const float* query, float* scores,
                Ahead& ahead) {
  // Half of the lines read here, the others when values are added: asked for evenly, they come fastest.
  constexpr int kLines = dot_tokens(R) * (kPair * sizeof(T) > Ahead::kLine ? kPair * sizeof(T) / Ahead::kLine : 1);
  constexpr int kTokens = dot_tokens(R), kVectors = Product<T>::kVectors;
  Ahead asking = ahead;
  for (int first = 0; first < count; first += kTokens) {
    const T* token[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) token[t] = tokens[first + t < count ? first + t : count - 1];
    V acc[R][kTokens];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) acc[r][t] = splat(0.0f);
    }
    const float* q = query;
    for (int d = 0; d < dim; d += kPair, q += kVectors * kLanes) {
      if (d * sizeof(T) % Ahead::kLine == 0) asking.ask<kLines / 2>();
      V x[kTokens][kVectors];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) Product<T>::load_words(token[t] + d, x[t]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const V y = load(q + r * kWordStride<T> + v * kLanes);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) acc[r][t] = Product<T>::add(x[t][v], y, acc[r][t]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* to = scores + r * kFewTile + first;
      if constexpr (kTokens % 4 == 0) {
#pragma GCC unroll 2
        for (int t = 0; t < kTokens; t += 4) sum_lanes4(acc[r][t], acc[r][t + 1], acc[r][t + 2], acc[r][t + 3], to + t);
      } else {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) to[t] = sum_lanes(acc[r][t]);
      }
    }
  }
  ahead = asking;
}

template <class T, int R = kDotRows>
inline void score_few_rows(int rows, int dim, int count, const T* const* tokens, const float* query, float* scores,
                           Ahead& ahead) {
  if (rows == R) return score_dots<T, R>(dim, count, tokens, query, scores, ahead);
  if constexpr (R > 1) score_few_rows<T, R - 1>(rows, dim, count, tokens, query, scores, ahead);
}

template <class T>
void score_few(const Problem& p, int rows, int count, const T* const* tokens, Ahead& ahead, Scratch& s) {
  const int blocks = (rows + kDotRows - 1) / kDotRows;
  for (int i = 0, r = 0; i < blocks; ++i) {
    const int size = (rows - r) / (blocks - i);
    score_few_rows<T>(size, p.head_dim, count, tokens, s.query + r * kWordStride<T>, s.scores + r * kFewTile, ahead);
    r += size;
  }
}

// Turns scores of one tile into probabilities and moves max and sum on; tokens lie in the lanes.
void softmax_few(const Problem& p, int rows, int count, const float* seen, State state, Scratch& s) {
  alignas(64) static const float kIndex[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(sizeof kIndex == sizeof(float) * kFewTile && kFewTile % kLanes == 0);
  const V scale = splat(p.scale_log2), nothing = splat(-kInfinity);
  for (int r = 0; r < rows; ++r) {
    const V end = splat(seen ? seen[r] : (float)count), old = splat(state.max[r]);
    float* scores = s.scores + r * kFewTile;
    V x[kFewTile / kLanes];
    V top = old;
#pragma GCC unroll 4
    for (int i = 0; i < kFewTile / kLanes; ++i) {
      x[i] = select_less(load(kIndex + i * kLanes), end, load(scores + i * kLanes) * scale, nothing);
      top = max(x[i], top);
    }
    top = splat(max_lanes(top));
    const V base = finite_max(top);
    const V alpha = exp2(old - base);
    V sum = splat(0.0f);
#pragma GCC unroll 4
    for (int i = 0; i < kFewTile / kLanes; ++i) {
      x[i] = exp2(x[i] - base);
      store(scores + i * kLanes, x[i]);
      sum = sum + x[i];
    }
    s.alpha[r] = lane(alpha, 0);
    state.max[r] = lane(top, 0);
    state.sum[r] = state.sum[r] * s.alpha[r] + sum_lanes(sum);
  }
}

// Rows that are no whole pairs are read from padded copies.
template <class T>
void pad_tokens(const Problem& p, int count, T* copies, const T** tokens) {
  if (p.head_dim % kPair == 0) return;
  for (int t = 0; t < count; ++t) {
    T* copy = copies + t * kMaxDim;
    pad_row(tokens[t], copy, p.head_dim);
    tokens[t] = copy;
  }
}

template <class T>
void attend_few(const Problem& p, const Block& b, int begin, int end, State state, Scratch& s) {
  float seen[kFewRows];
  Window<T, 3, kFewTile> window(p, b, begin, end);
  for (int t = 0; t < window.count(0); ++t) prefetch_row(window.rows(0)[t], p.head_dim);
  for (int t = begin; t < end || t == begin; t += kFewTile, window.advance()) {
    const int count = window.count(0), next = window.count(1);
    const T** tokens = window.rows(0);
    pad_tokens(p, count, (T*)s.tile, tokens);
    // Where nothing is left, what is here already.
    Ahead ahead(next ? window.rows(1) : tokens, next ? next : 1, p.head_dim);
    score_few(p, b.rows, count, tokens, ahead, s);
    const bool all = count_seen(p, b, t, count, b.rows, seen);
    softmax_few(p, b.rows, count, all ? nullptr : seen, state, s);
    accumulate_seen<FewWeights>(p, b.rows, count, all ? nullptr : seen, tokens, t == begin, state, s, ahead);
  }
}

}  // namespace
}  // namespace hal_cpu
