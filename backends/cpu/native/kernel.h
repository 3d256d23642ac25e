// MLA decode for one block of query rows, in whatever vectors the including file chose (simd_*.h).
//
// A tile of kTile tokens is converted once to row-major float32 and serves every row of the block, as K and as V:
//
//   scores  S[t][r] = sum_d tile[t][d] * Q[d][r]      rows lie in the lanes, so softmax needs no horizontal step
//   values  O[r][c] = O[r][c] * alpha[r] + sum_t P[t][r] * tile[t][c]
//
// Both are the same outer-product microkernel and neither needs a transposed tile. Each output element is one chain of
// multiply-adds in a fixed order, whatever shares its register tile, so a row's bits do not depend on its neighbours.
//
// Everything is in an anonymous namespace and nothing of the C++ library is used: see problem.h.
#pragma once

#include <string.h>

#include "problem.h"

namespace hal_cpu {
namespace {

constexpr float kInfinity = __builtin_inff();

// ---------------------------------------------------------------------------------------------------------------------
// Elements of the three dtypes

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline V load(const Bf16* p) { return load_bf16(&p->bits); }
inline V load(const F16* p) { return load_f16(&p->bits); }
inline void store(Bf16* p, V v) { store_bf16(&p->bits, v); }
inline void store(F16* p, V v) { store_f16(&p->bits, v); }

inline int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Converts n elements and pads with zeros to whole vectors. Never reads past the row: it may end the allocation.
template <class T>
inline void widen_row(const T* from, float* to, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) {
    T rest[kLanes] = {};
    memcpy(rest, from + i, (n - i) * sizeof(T));
    store(to + i, load(rest));
  }
}

template <class T>
inline void narrow_row(const float* from, float factor, T* to, int n) {
  const V by = splat(factor);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i) * by);
  if (i < n) {
    T rest[kLanes];
    store(rest, load(from + i) * by);  // an accumulator row is padded to whole vectors
    memcpy(to + i, rest, (n - i) * sizeof(T));
  }
}

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

// ---------------------------------------------------------------------------------------------------------------------
// The microkernel: C[M][N vectors] (+)= A[M][depth] * B[depth][N vectors], all of C in registers

// Widest tile of N vectors that leaves registers for a row of B and a broadcast.
constexpr int max_rows(int n) {
  if (kRegisters == 32) return n == 4 ? 6 : 12;
  return n == 2 ? 6 : 12;
}
constexpr int kMaxVectors = kRegisters == 32 ? 4 : 2;

// alpha null: C starts at zero; else row m of C is scaled by alpha[m] first.
template <int M, int N, int kAStepM, int kAStepK, int kBStep>
inline void multiply(int depth, const float* a, const float* b, float* c, ptrdiff_t c_stride, const float* alpha) {
  V acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      acc[m][n] = alpha ? load(c + m * c_stride + n * kLanes) * splat(alpha[m]) : splat(0.0f);
  }
  for (int k = 0; k < depth; ++k) {
    V row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = splat(a[m * kAStepM]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = fma(x, row[n], acc[m][n]);
    }
    a += kAStepK;
    b += kBStep;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * c_stride + n * kLanes, acc[m][n]);
  }
}

// Picks the instance for a number of rows known at run time; the full height comes first.
template <int N, int kAStepM, int kAStepK, int kBStep, int M = max_rows(N)>
inline void multiply_rows(int rows, int depth, const float* a, const float* b, float* c, ptrdiff_t c_stride,
                          const float* alpha) {
  if (rows >= M) return multiply<M, N, kAStepM, kAStepK, kBStep>(depth, a, b, c, c_stride, alpha);
  if constexpr (M > 1)
    multiply_rows<N, kAStepM, kAStepK, kBStep, M - 1>(rows, depth, a, b, c, c_stride, alpha);
}

// ---------------------------------------------------------------------------------------------------------------------
// Query packing

// Few rows waste most lanes of S[t][r]: they take dot products over d instead, and q stays row-major.
inline bool few_rows(const Block& b) { return b.all_rows <= kLanes / 2; }

template <class T>
inline const T* query_row(const Problem& p, const Block& b, int r) {
  const int row = b.first_row + r;
  return (const T*)b.q + row / p.group * p.q_token + row % p.group * p.q_head;
}

// Column r of Q[d][r], in panels as wide as one microkernel so that each panel is read straight through.
template <class T>
void pack_query_panels(const Problem& p, const Block& b, float* to) {
  const int padded = round_up(b.rows, kLanes), dim = p.head_dim;
  float wide[kLanes][kTileStride];
  for (int first = 0; first < padded;) {
    int vectors = kMaxVectors;
    while (vectors * kLanes > padded - first) vectors /= 2;
    for (int v = 0; v < vectors; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        const int r = first + v * kLanes + i;
        if (r < b.rows) widen_row(query_row<T>(p, b, r), wide[i], dim);
        else memset(wide[i], 0, sizeof wide[i]);
      }
      float* column = to + v * kLanes;
      for (int d = 0; d < dim; ++d, column += vectors * kLanes)
        for (int i = 0; i < kLanes; ++i) column[i] = wide[i][d];
    }
    to += (ptrdiff_t)vectors * kLanes * dim;
    first += vectors * kLanes;
  }
}

template <class T>
void pack_query_as(const Problem& p, const Block& b, Scratch& s) {
  if (!few_rows(b)) return pack_query_panels<T>(p, b, s.query);
  for (int r = 0; r < b.rows; ++r) widen_row(query_row<T>(p, b, r), s.query + r * kTileStride, p.head_dim);
}

void pack_query(const Problem& p, const Block& b, Scratch& s) {
  if (p.dtype == kBfloat16) pack_query_as<Bf16>(p, b, s);
  else if (p.dtype == kFloat16) pack_query_as<F16>(p, b, s);
  else pack_query_as<float>(p, b, s);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles of the cache

// Walks over the rows of a sequence. The table is only looked at for a page that has a token in use.
class Cursor {
 public:
  Cursor(const Problem& p, const Block& b, int begin, int end)
      : p_(p), b_(b), size_(p.dtype == kFloat32 ? 4 : 2), left_(end - begin) {
    page_ = begin / p.page_size;
    offset_ = begin % p.page_size;
    if (left_ > 0) rows_ = b.kv + b.pages[page_] * p.kv_page * size_;
  }

  const char* next() {
    const char* row = rows_ + offset_ * p_.kv_token * size_;
    if (++offset_ == p_.page_size && left_ > 1) {
      offset_ = 0;
      rows_ = b_.kv + b_.pages[++page_] * p_.kv_page * size_;
    }
    --left_;
    return row;
  }

  // Asks for the next n rows, so that the tile after this one comes from memory while this one is computed with.
  void prefetch(int n) {
    const int bytes = p_.head_dim * (int)size_;
    for (; n > 0 && left_ > 0; --n) {
      const char* row = next();
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
    }
  }

 private:
  const Problem& p_;
  const Block& b_;
  const ptrdiff_t size_;
  int left_, page_, offset_;
  const char* rows_ = nullptr;
};

template <class T>
void load_tile_as(int dim, int count, Cursor& from, float* tile) {
  for (int t = 0; t < count; ++t) widen_row((const T*)from.next(), tile + t * kTileStride, dim);
}

void load_tile(const Problem& p, int count, Cursor& from, float* tile) {
  if (p.dtype == kBfloat16) load_tile_as<Bf16>(p.head_dim, count, from, tile);
  else if (p.dtype == kFloat16) load_tile_as<F16>(p.head_dim, count, from, tile);
  else load_tile_as<float>(p.head_dim, count, from, tile);
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores

template <int N>
const float* score_panel(int dim, int count, const float* tile, const float* query, float* scores, Cursor& ahead) {
  constexpr int kWidth = N * kLanes;
  for (int t = 0; t < count; t += max_rows(N)) {
    ahead.prefetch(max_rows(N));
    multiply_rows<N, kTileStride, 1, kWidth>(count - t, dim, tile + t * kTileStride, query, scores + t * kScoreStride,
                                             kScoreStride, nullptr);
  }
  return query + (ptrdiff_t)kWidth * dim;
}

void score_panels(const Problem& p, const Block& b, int count, Scratch& s, Cursor& ahead) {
  const int padded = round_up(b.rows, kLanes);
  const float* query = s.query;
  for (int first = 0; first < padded;) {
    const int left = (padded - first) / kLanes;
    float* scores = s.scores + first;
    if (kMaxVectors == 4 && left >= 4) {
      query = score_panel<kMaxVectors>(p.head_dim, count, s.tile, query, scores, ahead);
      first += 4 * kLanes;
    } else if (left >= 2) {
      query = score_panel<2>(p.head_dim, count, s.tile, query, scores, ahead);
      first += 2 * kLanes;
    } else {
      query = score_panel<1>(p.head_dim, count, s.tile, query, scores, ahead);
      first += kLanes;
    }
  }
}

// Tokens that share each load of q; enough accumulators to keep the multipliers busy, few enough to stay in registers.
constexpr int dot_tokens(int rows) {
  if (rows == 1) return 8;
  return rows == 2 || (rows <= 4 && kRegisters == 32) ? 4 : 2;
}

template <int R>
void score_dots(int dim, int count, const float* tile, const float* query, float* scores, Cursor& ahead) {
  constexpr int T = dot_tokens(R);
  const int padded = round_up(dim, kLanes);
  for (int first = 0; first < count; first += T) {
    ahead.prefetch(T);
    const float* token[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) token[t] = tile + (first + t < count ? first + t : count - 1) * kTileStride;
    V acc[R][T];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[r][t] = splat(0.0f);
    }
    for (int d = 0; d < padded; d += kLanes) {
      V x[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) x[t] = load(token[t] + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V q = load(query + r * kTileStride + d);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[r][t] = fma(q, x[t], acc[r][t]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        if (first + t < count) scores[(first + t) * kScoreStride + r] = sum_lanes(acc[r][t]);
    }
  }
}

template <int R = kLanes / 2>
void score_few(int rows, int dim, int count, Scratch& s, Cursor& ahead) {
  if (rows == R) score_dots<R>(dim, count, s.tile, s.query, s.scores, ahead);
  else if constexpr (R > 1) score_few<R - 1>(rows, dim, count, s, ahead);
}

// ---------------------------------------------------------------------------------------------------------------------
// Online softmax

// Turns scores of one tile into probabilities and moves max and sum on. seen[r] is how many of the tile's tokens row r
// attends to, null if all do.
void softmax(const Problem& p, int rows, int count, const float* seen, State state, Scratch& s) {
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

// ---------------------------------------------------------------------------------------------------------------------
// Values

template <int N>
void value_columns(int rows, int count, const float* scores, const float* tile, float* out, ptrdiff_t out_stride,
                   const float* alpha) {
  for (int r = 0; r < rows; r += max_rows(N))
    multiply_rows<N, 1, kScoreStride, kTileStride>(rows - r, count, scores + r, tile, out + r * out_stride, out_stride,
                                                   alpha ? alpha + r : nullptr);
}

// Rows first … first + rows - 1, all of which attend to exactly `count` tokens of the tile: a token that a row does not
// attend to is not even multiplied by zero, since it may hold NaN.
void accumulate(const Problem& p, int first, int rows, int count, bool fresh, State state, Scratch& s) {
  const int padded = round_up(p.head_dim_v, kLanes);
  const float* scores = s.scores + first;
  const float* alpha = fresh ? nullptr : s.alpha + first;
  float* out = state.out + first * state.out_stride;
  for (int c = 0; c < padded;) {
    const int left = (padded - c) / kLanes;
    const float* tile = s.tile + c;
    if (kMaxVectors == 4 && left >= 4) {
      value_columns<kMaxVectors>(rows, count, scores, tile, out + c, state.out_stride, alpha);
      c += 4 * kLanes;
    } else if (left >= 2) {
      value_columns<2>(rows, count, scores, tile, out + c, state.out_stride, alpha);
      c += 2 * kLanes;
    } else {
      value_columns<1>(rows, count, scores, tile, out + c, state.out_stride, alpha);
      c += kLanes;
    }
  }
}

// How many of the tile's tokens each row attends to; false if that is all of them for every row.
bool count_seen(const Problem& p, const Block& b, int begin, int count, float* seen) {
  bool ragged = false;
  for (int r = 0; r < round_up(b.rows, kLanes); ++r) {
    int n = count;
    if (r < b.rows) {
      n = visible(p, b, b.first_row + r) - begin;
      n = n < 0 ? 0 : n > count ? count : n;
    }
    seen[r] = (float)n;
    ragged |= n != count;
  }
  return ragged;
}

void accumulate_ragged(const Problem& p, const Block& b, const float* seen, bool fresh, State state, Scratch& s) {
  for (int first = 0; first < b.rows;) {
    int end = first + 1;
    while (end < b.rows && seen[end] == seen[first]) ++end;
    // Nothing of this tile and something before: the state stands as it is.
    if (seen[first] > 0 || fresh) accumulate(p, first, end - first, (int)seen[first], fresh, state, s);
    first = end;
  }
}

// Attends to tokens begin … end - 1 and leaves the result in `state`, whatever it held before.
void attend(const Problem& p, const Block& b, int begin, int end, State state, Scratch& s) {
  const int padded = round_up(b.rows, kLanes);
  for (int r = 0; r < padded; r += kLanes) {
    store(state.max + r, splat(-kInfinity));
    store(state.sum + r, splat(0.0f));
  }
  float seen[kRowBlock];
  const int step = few_rows(b) ? kFewTile : kTile;
  Cursor now(p, b, begin, end), ahead(p, b, end - begin < step ? end : begin + step, end);
  for (int t = begin; t < end || t == begin; t += step) {
    const int count = end - t < step ? end - t : step;
    load_tile(p, count, now, s.tile);
    if (few_rows(b)) score_few(b.rows, p.head_dim, count, s, ahead);
    else score_panels(p, b, count, s, ahead);
    const bool ragged = count_seen(p, b, t, count, seen);
    softmax(p, b.rows, count, ragged ? seen : nullptr, state, s);
    if (ragged) accumulate_ragged(p, b, seen, t == begin, state, s);
    else accumulate(p, 0, b.rows, count, t == begin, state, s);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Merging and writing

// Merges `from`, which covers later tokens, into `into`. A side that attended to nothing leaves the other's bits alone.
void fold(State into, State from, int first, int rows, int dim) {
  for (int r = first; r < first + rows; ++r) {
    const float a = into.max[r], b = from.max[r];
    if (b == -kInfinity) continue;
    const float top = a > b ? a : b;
    const float keep = a == -kInfinity ? 0.0f : exp2(a - top), add = exp2(b - top);
    into.max[r] = top;
    into.sum[r] = into.sum[r] * keep + from.sum[r] * add;
    float* to = into.out + r * into.out_stride;
    const float* more = from.out + r * from.out_stride;
    for (int c = 0; c < dim; c += kLanes)
      store(to + c, fma(load(more + c), splat(add), load(to + c) * splat(keep)));
  }
}

// Natural or base-2 logarithm of the sum of exponentials; +inf where there was nothing to attend to.
inline float log_sum(const Problem& p, float max, float sum) {
  const double bits = (double)max + __builtin_log2((double)sum);
  return (float)(p.base2 ? bits : bits * 0.693147180559945309417);
}

template <class T>
void finish_as(const Problem& p, const Block& b, State state, int first, int rows) {
  for (int r = first; r < first + rows; ++r) {
    const int row = b.first_row + r;
    const int query = row / p.group, head = row % p.group;
    T* out = (T*)b.out + query * p.out_token + head * p.out_head;
    float* lse = b.lse + head * p.lse_head + query;
    if (visible(p, b, row) == 0) {
      memset(out, 0, p.head_dim_v * sizeof(T));
      *lse = kInfinity;
    } else {
      narrow_row(state.out + r * state.out_stride, 1.0f / state.sum[r], out, p.head_dim_v);
      *lse = log_sum(p, state.max[r], state.sum[r]);
    }
  }
}

void finish(const Problem& p, const Block& b, State state, int first, int rows) {
  if (p.dtype == kBfloat16) finish_as<Bf16>(p, b, state, first, rows);
  else if (p.dtype == kFloat16) finish_as<F16>(p, b, state, first, rows);
  else finish_as<float>(p, b, state, first, rows);
}

}  // namespace
}  // namespace hal_cpu
