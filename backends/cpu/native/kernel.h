// MLA decode for one block of query rows, in whatever vectors the including file chose (simd_*.h): few_rows.h or
// many_rows.h attends to a range of tokens, states of several ranges are folded, and the result is written.
//
// Everything is in an anonymous namespace and nothing of the C++ library is used: see problem.h.
#pragma once

#include "few_rows.h"
#include "many_rows.h"
#ifdef HAL_CPU_TILES
#include "tiled_rows.h"
#endif

namespace hal_cpu {
namespace {

template <class T>
void pack_query_as(const Problem& p, const Block& b, Scratch& s) {
  if (few_rows(b)) pack_few<T>(p, b, s.query);
  else pack_panels<T>(p, b, s.query);
}

void pack_query(const Problem& p, const Block& b, Scratch& s) {
  if (p.dtype == kBfloat16) pack_query_as<Bf16>(p, b, s);
  else if (p.dtype == kFloat16) pack_query_as<F16>(p, b, s);
  else pack_query_as<float>(p, b, s);
}

template <class T>
void attend_as(const Problem& p, const Block& b, int begin, int end, State state, Scratch& s) {
  if (few_rows(b)) attend_few<T>(p, b, begin, end, state, s);
  else attend_many<T>(p, b, begin, end, state, s);
}

#ifdef HAL_CPU_TILES
template <>
void attend_as<Bf16>(const Problem& p, const Block& b, int begin, int end, State state, Scratch& s) {
  if (few_rows(b)) attend_few<Bf16>(p, b, begin, end, state, s);
  else attend_tiled(p, b, begin, end, state, s);
}
#endif

// Attends to tokens begin … end - 1 and leaves the result in `state`, whatever it held before.
void attend(const Problem& p, const Block& b, int begin, int end, State state, Scratch& s) {
  for (int r = 0; r < round_up(b.rows, kLanes); r += kLanes) {
    store(state.max + r, splat(-kInfinity));
    store(state.sum + r, splat(0.0f));
  }
  if (p.dtype == kBfloat16) attend_as<Bf16>(p, b, begin, end, state, s);
  else if (p.dtype == kFloat16) attend_as<F16>(p, b, begin, end, state, s);
  else attend_as<float>(p, b, begin, end, state, s);
}

// Merges `from`, which covers later tokens, into `into`. A side that attended to nothing leaves the other's bits alone.
void fold(State into, State from, int first, int rows, int dim) {
  const int padded = round_up(dim, kPair);
  for (int r = first; r < first + rows; ++r) {
    const float a = into.max[r], b = from.max[r];
    if (b == -kInfinity) continue;
    const float top = a > b ? a : b;
    const float keep = a == -kInfinity ? 0.0f : exp2(a - top), add = exp2(b - top);
    into.max[r] = top;
    into.sum[r] = into.sum[r] * keep + from.sum[r] * add;
    float* to = into.out + r * into.out_stride;
    const float* more = from.out + r * from.out_stride;
    for (int c = 0; c < padded; c += kLanes)
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
