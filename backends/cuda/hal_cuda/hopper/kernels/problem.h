// What the three kernels of one decode agree on: the tile, the schedule and the arguments.
#pragma once

#include "ptx.h"

constexpr int kHeadDim = 576;    // columns of K
constexpr int kHeadDimV = 512;   // columns of V, the first of K
constexpr int kRows = 64;        // query rows a block computes: positions × heads of one KV head
constexpr int kTokens = 64;      // keys a step takes
constexpr int kTileColumns = 64; // columns of one swizzled tile
constexpr int kTiles = kHeadDim / kTileColumns;
constexpr int kTilesV = kHeadDimV / kTileColumns;

// What a split costs beside its steps, in steps: loading q, storing and merging a partial result.
constexpr int kOverheadSteps = 5;

// The steps of all sequences in one row, cut into `parts` of equal cost. Part p runs from bounds[p] to bounds[p + 1].
struct Bound {
    int sequence;
    int step;
};

struct Problem {
    const u16* q;              // [b, s_q, h_q, 576]
    const int* block_table;    // [b, max_blocks]
    const int* cache_seqlens;  // [b]
    u16* out;                  // [b, s_q, h_q, 512]
    float* lse;                // [b, h_q, s_q]
    const Bound* bounds;       // [parts + 1]
    float* partial_out;        // [parts, 2, h_kv, row_blocks, 64, 512]: the first and the last sequence of a part
    float* partial_lse;        // [parts, 2, h_kv, row_blocks, 64], base 2
    long long q_batch, q_position, q_head;        // strides, in elements
    long long out_batch, out_position, out_head;
    long long table_batch;
    int batch, s_q, h_q, h_kv;
    int max_blocks, page_size, most_tokens;  // a table's tokens: no length exceeds them
    int parts, row_blocks;
    float scale_log2;          // softmax_scale · log2(e)
    int causal;
    float lse_factor;          // from base 2 to the caller's base
};
static_assert(sizeof(Problem) == HAL_PROBLEM_BYTES, "the host fills what the kernels read");

__device__ __forceinline__ int length_of(const Problem& problem, int sequence) {
    return min(max(problem.cache_seqlens[sequence], 0), problem.most_tokens);
}

// Lengths stay far below 2^31: the host takes no table of more than 2^30 tokens.
__device__ __forceinline__ int steps_of(int length) { return (length + kTokens - 1) / kTokens; }

// Where a part keeps what it computed of one of its sequences: slot 0 its first, slot 1 its last.
__device__ __forceinline__ long long partial_row(const Problem& problem, int part, int slot, int kv_head, int row_block) {
    return (((static_cast<long long>(part) * 2 + slot) * problem.h_kv + kv_head) * problem.row_blocks + row_block) * kRows;
}
