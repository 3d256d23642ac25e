// Values: O[r][c] = O[r][c] * alpha[r] + sum_t P[r][t] * row_t[c], read from wherever the rows are, in whatever dtype.
//
// Each output element is one chain of multiply-adds in the order of the tokens, whatever shares its register tile, so a
// row's bits do not depend on its neighbours.
#pragma once

#include "cursor.h"
#include "elements.h"

namespace hal_cpu {
namespace {

// Probabilities as one of the two kinds of scores leaves them: P[r][t] is at r * kRowStep + t * kTokenStep.
template <int kRowStep, int kTokenStep>
struct Weights {
  static constexpr int kRow = kRowStep, kToken = kTokenStep;
};

constexpr int kValueRows = 6;  // most rows that share what is loaded of a token

// Pairs of vectors of the output that M rows keep in registers.
constexpr int value_pairs(int rows) {
  const int most = (kRegisters == 32 ? 24 : 12) / 2 / rows;
  return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

// alpha null: O starts at zero.
template <class W, class T, int M, int N, class A>
inline void value_block(int count, const T* const* tokens, int column, const float* weights, float* out,
                        ptrdiff_t out_stride, const float* alpha, A& ahead) {
  // Asks for somewhat fewer lines than it reads; where that is half a line, for one where a line begins.
  constexpr int kLines = N * kPair * (int)sizeof(T) / Ahead::kLine;
  const bool asks = kLines || column * sizeof(T) % Ahead::kLine == 0;
  A asking = ahead;
  V acc[M][2 * N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < 2 * N; ++n)
      acc[m][n] = alpha ? load(out + m * out_stride + n * kLanes) * splat(alpha[m]) : splat(0.0f);
  }
  for (int t = 0; t < count; ++t) {
    const T* token = tokens[t] + column;
    if (asks) asking.template ask<kLines ? (3 * kLines + 2) / 4 : 1>();
    V x[2 * N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) load_pair(token + n * kPair, x + 2 * n);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V weight = splat(weights[m * W::kRow]);
#pragma GCC unroll 16
      for (int n = 0; n < 2 * N; ++n) acc[m][n] = fma(weight, x[n], acc[m][n]);
    }
    weights += W::kToken;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < 2 * N; ++n) store(out + m * out_stride + n * kLanes, acc[m][n]);
  }
  ahead = asking;
}

// Columns from `column` on, in blocks as wide as M rows allow and then in ever narrower ones.
template <class W, class T, int M, class A, int N = value_pairs(M)>
void value_columns(int pairs, int count, const T* const* tokens, int column, const float* weights, float* out,
                   ptrdiff_t out_stride, const float* alpha, A& ahead) {
  for (; pairs >= N; pairs -= N, column += N * kPair)
    value_block<W, T, M, N>(count, tokens, column, weights, out + column, out_stride, alpha, ahead);
  if constexpr (N > 1)
    if (pairs) value_columns<W, T, M, A, N / 2>(pairs, count, tokens, column, weights, out, out_stride, alpha, ahead);
}

template <class W, class T, class A, int M = kValueRows>
inline void value_rows(int rows, int pairs, int count, const T* const* tokens, const float* weights, float* out,
                       ptrdiff_t out_stride, const float* alpha, A& ahead) {
  if (rows == M) return value_columns<W, T, M>(pairs, count, tokens, 0, weights, out, out_stride, alpha, ahead);
  if constexpr (M > 1) value_rows<W, T, A, M - 1>(rows, pairs, count, tokens, weights, out, out_stride, alpha, ahead);
}

// Rows first … first + rows - 1, all of which attend to exactly the first `count` tokens: one that a row does not attend
// to is not even multiplied by zero, since it may hold NaN. `fresh`: the state holds nothing yet.
template <class W, class T, class A>
void accumulate(const Problem& p, int first, int rows, int count, const T* const* tokens, bool fresh, State state,
                Scratch& s, A& ahead) {
  const int pairs = round_up(p.head_dim_v, kPair) / kPair;
  const int blocks = (rows + kValueRows - 1) / kValueRows;
  for (int i = 0, r = first; i < blocks; ++i) {
    const int size = (first + rows - r) / (blocks - i);  // even blocks: a low one makes poor use of what it loads
    value_rows<W, T>(size, pairs, count, tokens, s.scores + r * W::kRow, state.out + r * state.out_stride,
                     state.out_stride, fresh ? nullptr : s.alpha + r, ahead);
    r += size;
  }
}

// seen[r] is how many of the tile's tokens row r attends to, null if all do.
template <class W, class T, class A>
void accumulate_seen(const Problem& p, int rows, int count, const float* seen, const T* const* tokens, bool fresh,
                     State state, Scratch& s, A& ahead) {
  if (!seen) return accumulate<W, T>(p, 0, rows, count, tokens, fresh, state, s, ahead);
  for (int first = 0; first < rows;) {
    int end = first + 1;
    while (end < rows && seen[end] == seen[first]) ++end;
    // Nothing of this tile and something before: the state stands as it is.
    if (seen[first] > 0 || fresh)
      accumulate<W, T>(p, first, end - first, (int)seen[first], tokens, fresh, state, s, ahead);
    first = end;
  }
}

}  // namespace
}  // namespace hal_cpu
