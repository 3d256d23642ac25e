// How a decode step is cut into parts of equal cost, and which pieces are merged afterwards.
#pragma once

#include <stdint.h>

#include <vector>

namespace hal_cpu {

// What a schedule depends on besides the lengths.
struct Shape {
  int batch, queries;  // queries a sequence; 0 where ragged
  int heads_q, heads_kv, head_dim, head_dim_v;
  bool causal, invariant, ragged;

  bool operator==(const Shape& o) const {
    return batch == o.batch && queries == o.queries && heads_q == o.heads_q && heads_kv == o.heads_kv &&
           head_dim == o.head_dim && head_dim_v == o.head_dim_v && causal == o.causal && invariant == o.invariant &&
           ragged == o.ragged;
  }
};

// A block of query rows of one sequence and KV head, with all the tokens it attends to.
struct Unit {
  int sequence, kv_head;
  int first_row, rows;
  int end;    // tokens that any of its rows sees
  int chunk;  // tokens attended into one state; chunks are folded in order
};

// Tokens begin … end - 1 of a unit, on one thread. slot -1: the whole unit, written out at once.
struct Item {
  int unit, begin, end, slot;
};

// A unit in pieces: the states of `slots` consecutive slots, folded in order.
struct Merge {
  int unit, first_slot, slots;
};

struct Schedule {
  Shape shape;
  std::vector<int32_t> lengths;
  std::vector<int32_t> first_query;  // batch + 1 offsets where ragged, else empty
  std::vector<Unit> units;
  std::vector<Item> items;
  std::vector<int> parts;  // items of part i: parts[i] … parts[i + 1] - 1
  std::vector<Merge> merges;
  int slots, slot_rows;  // states to keep for merging, and the rows of the largest

  int queries(int sequence) const {
    return shape.ragged ? first_query[sequence + 1] - first_query[sequence] : shape.queries;
  }
};

// Lengths must be 0 or more and offsets must not fall (the caller checked). Reuses the vectors' memory.
void make_schedule(const Shape& shape, const int32_t* lengths, const int32_t* first_query, int threads,
                   Schedule& into);

}  // namespace hal_cpu
