// The data every kernel shares: plain structs only, because each instruction set compiles its own copy of kernel.h and
// nothing inline may be shared between those translation units (the linker would keep just one of the copies).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace hal_cpu {

enum Dtype : int { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

constexpr int kMaxDim = 576;
constexpr int kTile = 64;       // tokens converted and attended at a time
constexpr int kFewTile = 16;    // the same for few rows, whose tile then stays in the first-level cache
constexpr int kRowBlock = 128;  // query rows a task carries at most

// Strides are compile-time constants so that the microkernels address with immediates. Both are an odd number of cache
// lines, which spreads rows over all sets of the first-level cache.
constexpr int kTileStride = kMaxDim + 16;
constexpr int kScoreStride = kRowBlock + 16;
constexpr int kTiledWeights = kRowBlock * kTile;  // words: two bfloat16 a probability

// What one call means; strides count elements of the tensor's dtype.
struct Problem {
  const char* q;
  const char* kv;
  const int32_t* table;
  char* out;
  float* lse;
  ptrdiff_t q_batch, q_token, q_head;
  ptrdiff_t kv_page, kv_token, kv_head;
  ptrdiff_t table_row;
  ptrdiff_t out_batch, out_token, out_head;
  ptrdiff_t lse_batch, lse_head;  // queries of a head lie side by side
  int dtype, head_dim, head_dim_v, page_size;
  int group;  // query heads a KV head serves
  bool causal, base2;
  float scale_log2;  // softmax scale times log2(e): scores are in base 2
};

// A block of query rows of one sequence and KV head. Row r is query r / group, head r % group; pointers are at row 0.
struct Block {
  const char* q;
  const char* kv;
  const int32_t* pages;
  char* out;
  float* lse;
  int first_row, rows;
  int all_rows;  // of the whole sequence and KV head: decides how rows are computed, so no split may change it
  int queries, length;
};

// Online softmax of a block: running maximum, sum and unnormalised output, per row.
struct State {
  float* max;
  float* sum;
  float* out;
  ptrdiff_t out_stride;
};

// Per-thread working memory, all 64-byte aligned.
struct Scratch {
  float* query;   // the block's rows, packed for the microkernel
  float* tile;    // kTile tokens as float32, row-major
  float* scores;  // [kTile][kScoreStride], then probabilities
  float* alpha;   // per row: how much the old state shrinks
  float* weights; // probabilities as tiles, where the processor has such
  State own, chunk;
};

struct Kernels {
  const char* name;
  void (*pack_query)(const Problem&, const Block&, Scratch&);
  void (*attend)(const Problem&, const Block&, int begin, int end, State, Scratch&);
  void (*fold)(State into, State from, int first, int rows, int dim);
  void (*finish)(const Problem&, const Block&, State, int first, int rows);
};

// Keys a row sees. Query i of a sequence sees keys up to length - queries + i where the call is causal.
inline int visible(const Problem& p, const Block& b, int row) {
  if (!p.causal) return b.length;
  const int64_t last = (int64_t)b.length - b.queries + row / p.group + 1;
  return last < 0 ? 0 : (int)last;
}

}  // namespace hal_cpu
