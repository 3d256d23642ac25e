// Many query rows: a tile of kTile tokens is unpacked once to words (see Product) and scored with rows in the lanes:
//
//   S[t][r] = sum_w tile[t][w] * Q[w][r]
//
// an outer product that needs no transposed tile, and leaves softmax without a step across lanes.
#pragma once

#include "cursor.h"
#include "exp2.h"
#include "values.h"

namespace hal_cpu {
namespace {

using ManyWeights = Weights<1, kScoreStride>;

constexpr int kSoon = 6;  // rows between asking for the first tile's and unpacking them

constexpr int kMaxVectors = kRegisters == 32 ? 4 : 2;

// Most tokens that N vectors of rows leave registers for, next to a row of Q and a broadcast.
constexpr int score_tokens(int n) {
  if (kRegisters == 32) return n == 4 ? 6 : 12;
  return n == 2 ? 6 : 12;
}

// to[i] = from[..][i], both kLanes × kLanes: log2(kLanes) rounds that interleave the two halves of the rows.
inline void transpose(V rows[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    V mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2]);
      mixed[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

// Widest panel that so many vectors of rows still fill.
inline int panel_vectors(int left) {
  int vectors = kMaxVectors;
  while (vectors > left) vectors /= 2;
  return vectors;
}

// Column r of Q[w][r], in panels as wide as one microkernel so that each panel is read straight through.
template <class T>
void pack_panels(const Problem& p, const Block& b, float* to) {
  const int words = word_count<T>(p.head_dim), all = round_up(b.rows, kLanes) / kLanes;
  alignas(64) float unpacked[kLanes][kTileStride];
  for (int first = 0; first < all;) {
    const int vectors = panel_vectors(all - first);
    for (int v = 0; v < vectors; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        const int r = (first + v) * kLanes + i;
        if (r < b.rows) unpack_row(query_row<T>(p, b, r), unpacked[i], p.head_dim);
        else memset(unpacked[i], 0, words * sizeof(float));
      }
      for (int w = 0; w < words; w += kLanes) {
        V square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(unpacked[i] + w);
        transpose(square);
        for (int i = 0; i < kLanes; ++i) store(to + ((ptrdiff_t)(w + i) * vectors + v) * kLanes, square[i]);
      }
    }
    to += (ptrdiff_t)vectors * kLanes * words;
    first += vectors;
  }
}

// M tokens times N vectors of rows, all sums in registers. Each is one chain in the order of the words.
template <class T, int M, int N>
inline void score_block(int words, const float* tile, const float* query, float* scores, const T* const* ahead) {
  constexpr int kLine = 64 / sizeof(T) / 2 * Product<T>::kVectors;  // words that a cache line of elements makes
  V acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = splat(0.0f);
  }
  for (int w = 0; w < words; ++w) {
    if (ahead && w % kLine == 0) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) prefetch(ahead[m] + w / kLine * (64 / sizeof(T)));
    }
    V row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(query + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = splat(tile[m * kWordStride<T>]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = Product<T>::add(row[n], x, acc[m][n]);
    }
    ++tile;
    query += N * kLanes;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(scores + m * kScoreStride + n * kLanes, acc[m][n]);
  }
}

// Picks the instance for a number of tokens known at run time; the full height comes first.
template <class T, int N, int M = score_tokens(N)>
inline void score_tokens_of(int tokens, int words, const float* tile, const float* query, float* scores,
                            const T* const* ahead) {
  if (tokens == M) return score_block<T, M, N>(words, tile, query, scores, ahead);
  if constexpr (M > 1) score_tokens_of<T, N, M - 1>(tokens, words, tile, query, scores, ahead);
}

template <class T, int N>
void score_panel(int words, int count, const float* tile, const float* query, float* scores,
                 const T* const* ahead) {
  const int blocks = (count + score_tokens(N) - 1) / score_tokens(N);
  for (int i = 0, t = 0; i < blocks; ++i) {
    const int size = (count - t) / (blocks - i);
    score_tokens_of<T, N>(size, words, tile + t * kWordStride<T>, query, scores + t * kScoreStride,
                          ahead ? ahead + t : nullptr);
    t += size;
  }
}

template <class T>
void score_panels(const Problem& p, const Block& b, int count, const T* const* ahead, Scratch& s) {
  const int words = word_count<T>(p.head_dim), all = round_up(b.rows, kLanes) / kLanes;
  const float* query = s.query;
  for (int first = 0; first < all;) {
    const int vectors = panel_vectors(all - first);
    float* scores = s.scores + first * kLanes;
    if (vectors == 1) score_panel<T, 1>(words, count, s.tile, query, scores, ahead);
    else if (vectors == 2) score_panel<T, 2>(words, count, s.tile, query, scores, ahead);
    else score_panel<T, kMaxVectors>(words, count, s.tile, query, scores, ahead);
    query += (ptrdiff_t)vectors * kLanes * words;
    first += vectors;
    ahead = nullptr;
  }
}

// Turns scores of one tile into probabilities and moves max and sum on; rows lie in the lanes. seen[r] is how many of
// the tile's tokens row r attends to, null if all do.
void softmax_many(const Problem& p, int rows, int count, const float* seen, State state, Scratch& s) {
  const V scale = splat(p.scale_log2), nothing = splat(-kInfinity);
  for (int r = 0; r < rows; r += kLanes) {
    float* column = s.scores + r;
    const V old = load(state.max + r);
    V top = old;
    for (int t = 0; t < count; ++t) {
      V x = load(column + t * kScoreStride) * scale;
      if (seen) x = select_less(splat((float)t), load(seen + r), x, nothing);
      store(column + t * kScoreStride, x);
      top = max(x, top);
    }
    const V base = finite_max(top);
    const V alpha = exp2(old - base);
    V sum = splat(0.0f);
    for (int t = 0; t < count; ++t) {
      const V x = exp2(load(column + t * kScoreStride) - base);
      store(column + t * kScoreStride, x);
      sum = sum + x;
    }
    store(state.max + r, top);
    store(state.sum + r, fma(load(state.sum + r), alpha, sum));
    store(s.alpha + r, alpha);
  }
}

template <class T>
void attend_many(const Problem& p, const Block& b, int begin, int end, State state, Scratch& s) {
  // What values are read from: the tile again, as float32 or, where words are the elements themselves, as those.
  using Element = typename Product<T>::Value;
  float seen[kRowBlock];
  const Element* tokens[kTile];
  for (int t = 0; t < kTile; ++t) tokens[t] = (const Element*)(s.tile + t * kWordStride<T>);
  NothingAhead nothing;
  Window<T, 2, kTile> window(p, b, begin, end);
  for (int t = begin; t < end || t == begin; t += kTile, window.advance()) {
    const int count = window.count(0);
    for (int i = 0; i < count; ++i) {
      // Of the first tile nothing was asked for yet.
      if (t == begin && i + kSoon < count) prefetch_row(window.rows(0)[i + kSoon], p.head_dim);
      unpack_row(window.rows(0)[i], s.tile + i * kWordStride<T>, p.head_dim);
    }
    score_panels<T>(p, b, count, window.count(1) ? window.rows(1) : nullptr, s);
    const bool all = count_seen(p, b, t, count, round_up(b.rows, kLanes), seen);
    softmax_many(p, b.rows, count, all ? nullptr : seen, state, s);
    accumulate_seen<ManyWeights>(p, b.rows, count, all ? nullptr : seen, tokens, t == begin, state, s, nothing);
  }
}

}  // namespace
}  // namespace hal_cpu
