// Many query rows in bfloat16, by products of tiles (tiles.h). Scores are as in many_rows.h: a tile of words times a
// panel of Q. Values are
//
//   O[r][c] += sum_t P[r][t] * V[t][c]
//
// with each probability as the sum of two bfloat16, which leaves out less than 2^-17 of it, and tokens in pairs, as the
// product wants them.
#pragma once

#include "many_rows.h"
#include "tiles.h"

namespace hal_cpu {
namespace {

constexpr int kStep = 32;  // tokens of one product, and of a block of scores
constexpr int kTileWords = 16 * 16;
constexpr int kPairStride = kMaxDim;
// Tokens in pairs lie behind the tokens themselves.
static_assert(kTile * kWordStride<Bf16> + kTile / 2 * kPairStride <= kTile * kTileStride, "the tile's memory");
static_assert(kRowBlock / 16 * (kTile / kStep) * 2 * kTileWords <= kTiledWeights, "the weights' memory");

// 32 tokens times one or two panels' vectors of rows. Rows of the tile that hold no token make scores nobody reads.
template <int N>
inline void score_step(Tiles& tiles, int words, int vectors, const float* tile, const float* query, float* scores,
                       const Bf16* const* ahead) {
  (void)tiles;
  HAL_TILE_ZERO(0);
  HAL_TILE_ZERO(2);
  if constexpr (N == 2) {
    HAL_TILE_ZERO(1);
    HAL_TILE_ZERO(3);
  }
  constexpr int kBytes = kWordStride<Bf16> * 4;
  for (int w = 0; w < words; w += 16) {
    if (ahead)
      for (int i = 0; i < kStep; ++i) prefetch(ahead[i] + 2 * w);
    HAL_TILE_LOAD(4, tile + w, kBytes);
    HAL_TILE_LOAD(5, tile + 16 * kWordStride<Bf16> + w, kBytes);
    HAL_TILE_LOAD(6, query + (ptrdiff_t)w * vectors * 16, vectors * 64);
    HAL_TILE_ADD_PRODUCT(0, 4, 6);
    HAL_TILE_ADD_PRODUCT(2, 5, 6);
    if constexpr (N == 2) {
      HAL_TILE_LOAD(7, query + ((ptrdiff_t)w * vectors + 1) * 16, vectors * 64);
      HAL_TILE_ADD_PRODUCT(1, 4, 7);
      HAL_TILE_ADD_PRODUCT(3, 5, 7);
    }
  }
  HAL_TILE_STORE(0, scores, kScoreStride * 4);
  HAL_TILE_STORE(2, scores + 16 * kScoreStride, kScoreStride * 4);
  if constexpr (N == 2) {
    HAL_TILE_STORE(1, scores + 16, kScoreStride * 4);
    HAL_TILE_STORE(3, scores + 16 * kScoreStride + 16, kScoreStride * 4);
  }
}

void score_tiles(Tiles& tiles, const Problem& p, const Block& b, int count, const Bf16* const* ahead, Scratch& s) {
  const int words = word_count<Bf16>(p.head_dim), all = round_up(b.rows, 16) / 16;
  const float* query = s.query;
  for (int first = 0; first < all;) {
    const int vectors = panel_vectors(all - first);
    for (int v = 0; v < vectors; v += 2) {
      float* scores = s.scores + (first + v) * 16;
      for (int t = 0; t < count; t += kStep, scores += kStep * kScoreStride) {
        const float* tile = s.tile + t * kWordStride<Bf16>;
        const Bf16* const* wanted = ahead ? ahead + t : nullptr;
        if (vectors == 1) score_step<1>(tiles, words, vectors, tile, query, scores, wanted);
        else score_step<2>(tiles, words, vectors, tile, query + v * 16, scores, wanted);
      }
      ahead = nullptr;
    }
    query += (ptrdiff_t)vectors * 16 * words;
    first += vectors;
  }
}

// Word c of a pair holds column c of both tokens, even columns first and then odd ones, as the output has them. Tokens
// that are not there are zeros: their weights are, and zero times whatever else lies there may be NaN.
void pair_tokens(const Problem& p, int count, Scratch& s) {
  const int width = round_up(p.head_dim_v, kPair) / 2;
  for (int t = 0; t < round_up(count, kStep); t += 2) {
    const float* from = s.tile + t * kWordStride<Bf16>;
    float* to = s.tile + kTile * kWordStride<Bf16> + t / 2 * kPairStride;
    const __m512i high = _mm512_set1_epi32((int)0xffff0000), none = _mm512_setzero_si512();
    for (int w = 0; w < width; w += 16) {
      const __m512i x = t < count ? _mm512_loadu_si512(from + w) : none;
      const __m512i y = t + 1 < count ? _mm512_loadu_si512(from + kWordStride<Bf16> + w) : none;
      _mm512_storeu_si512(to + 2 * w, _mm512_or_si512(_mm512_andnot_si512(high, x), _mm512_slli_epi32(y, 16)));
      _mm512_storeu_si512(to + 2 * w + 16, _mm512_or_si512(_mm512_srli_epi32(x, 16), _mm512_and_si512(high, y)));
    }
  }
}

// Of 16 rows and 32 tokens a tile of the probabilities rounded to bfloat16 and one of what that leaves.
void pack_weights(int rows, int count, Scratch& s) {
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  float* to = s.weights;
  for (int r = 0; r < rows; r += 16) {
    for (int t = 0; t < count; t += kStep, to += 2 * kTileWords) {
      V halves[2][16];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 16; ++i) {
          const int token = t + 16 * half + i;
          halves[half][i] = token < count ? load(s.scores + token * kScoreStride + r) : splat(0.0f);
        }
        transpose(halves[half]);
      }
      for (int i = 0; i < 16; ++i) {
        V main[2], rest[2];
        for (int half = 0; half < 2; ++half) {
          main[half] = _mm512_castsi512_ps(_mm512_and_si512(round_bf16(halves[half][i]), high));
          rest[half] = halves[half][i] - main[half];
        }
        _mm512_storeu_si512(to + 16 * i, (__m512i)_mm512_cvtne2ps_pbh(main[1], main[0]));
        _mm512_storeu_si512(to + kTileWords + 16 * i, (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0]));
      }
    }
  }
}

// 16 or 32 rows and 32 columns, over all tokens of the tile.
template <int M>
inline void value_tiles(Tiles& tiles, int steps, const float* weights, const float* pairs, bool fresh, float* out,
                        ptrdiff_t out_stride) {
  (void)tiles;
  const ptrdiff_t bytes = out_stride * 4;
  float* below = out + 16 * out_stride;
  if (fresh) {
    HAL_TILE_ZERO(0);
    HAL_TILE_ZERO(1);
    HAL_TILE_ZERO(2);
    HAL_TILE_ZERO(3);
  } else {
    HAL_TILE_LOAD(0, out, bytes);
    HAL_TILE_LOAD(1, out + 16, bytes);
    if constexpr (M == 2) {
      HAL_TILE_LOAD(2, below, bytes);
      HAL_TILE_LOAD(3, below + 16, bytes);
    }
  }
  const ptrdiff_t next = (ptrdiff_t)steps * 2 * kTileWords;  // from 16 rows to the 16 below
  for (int k = 0; k < steps; ++k, pairs += 16 * kPairStride) {
    HAL_TILE_LOAD(6, pairs, kPairStride * 4);
    HAL_TILE_LOAD(7, pairs + 16, kPairStride * 4);
    for (int part = 0; part < 2; ++part, weights += kTileWords) {
      HAL_TILE_LOAD(4, weights, 64);
      HAL_TILE_ADD_PRODUCT(0, 4, 6);
      HAL_TILE_ADD_PRODUCT(1, 4, 7);
      if constexpr (M == 2) {
        HAL_TILE_LOAD(5, weights + next, 64);
        HAL_TILE_ADD_PRODUCT(2, 5, 6);
        HAL_TILE_ADD_PRODUCT(3, 5, 7);
      }
    }
  }
  HAL_TILE_STORE(0, out, bytes);
  HAL_TILE_STORE(1, out + 16, bytes);
  if constexpr (M == 2) {
    HAL_TILE_STORE(2, below, bytes);
    HAL_TILE_STORE(3, below + 16, bytes);
  }
}

// Rows whose maximum stood need no factor, and after a few tiles those are most.
void shrink(const Problem& p, int rows, State state, const Scratch& s) {
  const int padded = round_up(p.head_dim_v, kPair);
  for (int r = 0; r < rows; ++r) {
    if (s.alpha[r] == 1.0f) continue;
    float* out = state.out + r * state.out_stride;
    for (int c = 0; c < padded; c += kLanes) store(out + c, load(out + c) * splat(s.alpha[r]));
  }
}

void accumulate_tiles(Tiles& tiles, const Problem& p, int rows, int count, bool fresh, State state, Scratch& s) {
  const int padded = round_up(rows, 16), steps = round_up(count, kStep) / kStep;
  if (!fresh) shrink(p, padded, state, s);
  pack_weights(rows, count, s);
  pair_tokens(p, count, s);
  HAL_TILES_SEE_MEMORY();
  const float* pairs = s.tile + kTile * kWordStride<Bf16>;
  for (int r = 0; r < padded; r += 32) {
    const float* weights = s.weights + (ptrdiff_t)r / 16 * steps * 2 * kTileWords;
    for (int c = 0; c < p.head_dim_v; c += kPair) {
      float* out = state.out + r * state.out_stride + c;
      if (padded - r == 16) value_tiles<1>(tiles, steps, weights, pairs + c, fresh, out, state.out_stride);
      else value_tiles<2>(tiles, steps, weights, pairs + c, fresh, out, state.out_stride);
    }
  }
  HAL_TILES_SEE_MEMORY();
}

void attend_tiled(const Problem& p, const Block& b, int begin, int end, State state, Scratch& s) {
  Tiles tiles;
  float seen[kRowBlock];
  const Bf16* tokens[kTile];
  for (int t = 0; t < kTile; ++t) tokens[t] = (const Bf16*)(s.tile + t * kWordStride<Bf16>);
  const Bf16* ahead[kTile] = {};
  NothingAhead nothing;
  Cursor now(p, b, begin, end), later(p, b, end - begin < kTile ? end : begin + kTile, end);
  for (int t = begin; t < end || t == begin; t += kTile) {
    const int count = end - t < kTile ? end - t : kTile, left = end - t - count;
    for (int i = 0; i < count; ++i) unpack_row((const Bf16*)now.next(), s.tile + i * kWordStride<Bf16>, p.head_dim);
    later.find(left < kTile ? left : kTile, ahead);
    HAL_TILES_SEE_MEMORY();
    score_tiles(tiles, p, b, count, left > 0 ? ahead : nullptr, s);
    HAL_TILES_SEE_MEMORY();
    const bool all = count_seen(p, b, t, count, round_up(b.rows, kLanes), seen);
    softmax_many(p, b.rows, count, all ? nullptr : seen, state, s);
    // Where some query of the sequence sees less, none of its rows is computed by tiles, whichever block it is in.
    const bool whole = !p.causal || b.length - b.queries + 1 >= t + count;
    if (whole) accumulate_tiles(tiles, p, b.rows, count, t == begin, state, s);
    else accumulate_seen<ManyWeights>(p, b.rows, count, all ? nullptr : seen, tokens, t == begin, state, s, nothing);
  }
}

}  // namespace
}  // namespace hal_cpu
