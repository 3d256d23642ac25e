#include "decode.h"

#include <stdlib.h>

#include <algorithm>
#include <new>

#include "isa.h"
#include "threads.h"

namespace hal_cpu {
namespace {

constexpr int64_t kMostPlannedRows = 1 << 26;
constexpr int kMergeRows = 16;  // rows one merge task folds

size_t state_floats(int rows, int head_dim_v) {
  const size_t padded = (rows + 15) / 16 * 16;
  return padded * (2 + (head_dim_v + 31) / 32 * 32);
}

State state_at(float* memory, int rows, int head_dim_v) {
  const size_t padded = (rows + 15) / 16 * 16;
  return {memory, memory + padded, memory + 2 * padded, (head_dim_v + 31) / 32 * 32};
}

// Cache-line aligned floats that only ever grow, so that the steady state allocates nothing.
class Memory {
 public:
  ~Memory() { free(data_); }
  float* need(size_t floats) {
    if (floats > size_) {
      free(data_);
      size_ = 0;
      const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      data_ = (float*)aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

// What each thread works in: about 1.5 MiB.
struct Workspace {
  Memory memory;
  Scratch scratch;

  Scratch& ready() {
    constexpr size_t kQuery = (size_t)kRowBlock * kTileStride, kTileFloats = (size_t)kTile * kTileStride;
    constexpr size_t kScores = (size_t)kTile * kScoreStride;
    const size_t state = state_floats(kRowBlock, kMaxDim);
    float* at = memory.need(kQuery + kTileFloats + kScores + kRowBlock + kTiledWeights + 2 * state);
    scratch.query = at;
    scratch.tile = scratch.query + kQuery;
    scratch.scores = scratch.tile + kTileFloats;
    scratch.alpha = scratch.scores + kScores;
    scratch.weights = scratch.alpha + kRowBlock;
    scratch.own = state_at(scratch.weights + kTiledWeights, kRowBlock, kMaxDim);
    scratch.chunk = state_at(scratch.weights + kTiledWeights + state, kRowBlock, kMaxDim);
    return scratch;
  }
};

thread_local Workspace workspace;
thread_local Memory slot_memory;
thread_local Schedule own_schedule;

struct Run {
  const Call& call;
  const Schedule& schedule;
  const Kernels& kernels;
  float* slots;
  size_t slot_floats;
  int merge_blocks;  // merge tasks of one unit

  State slot(int index) const {
    return state_at(slots + slot_floats * index, schedule.slot_rows, call.problem.head_dim_v);
  }
};

size_t element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

Block block_of(const Run& run, const Unit& u) {
  const Problem& p = run.call.problem;
  const Schedule& s = run.schedule;
  const size_t size = element_size(p.dtype);
  const ptrdiff_t head = (ptrdiff_t)u.kv_head * p.group;
  // The first query of a sequence: at its offset among all queries where ragged, else at its own batch row.
  ptrdiff_t q = u.sequence * p.q_batch, out = u.sequence * p.out_batch, lse = u.sequence * p.lse_batch;
  if (s.shape.ragged) {
    const ptrdiff_t first = s.first_query[u.sequence];
    q = first * p.q_token, out = first * p.out_token, lse = first;
  }
  Block b;
  b.q = p.q + (q + head * p.q_head) * size;
  b.out = p.out + (out + head * p.out_head) * size;
  b.lse = p.lse + lse + head * p.lse_head;
  b.kv = p.kv + u.kv_head * p.kv_head * size;
  b.pages = p.table + u.sequence * p.table_row;
  b.first_row = u.first_row;
  b.rows = u.rows;
  b.queries = s.queries(u.sequence);
  b.all_rows = (int)std::min<int64_t>((int64_t)b.queries * p.group, 1 << 30);
  b.length = s.lengths[u.sequence];
  return b;
}

void attend_item(const Run& run, const Item& item, const Block& block, Scratch& scratch) {
  const Unit& u = run.schedule.units[item.unit];
  const Problem& p = run.call.problem;
  const State state = item.slot < 0 ? scratch.own : run.slot(item.slot);
  int t = std::min(item.end - item.begin, u.chunk) + item.begin;
  run.kernels.attend(p, block, item.begin, t, state, scratch);
  for (int end; t < item.end; t = end) {
    end = t + std::min(item.end - t, u.chunk);
    run.kernels.attend(p, block, t, end, scratch.chunk, scratch);
    run.kernels.fold(state, scratch.chunk, 0, u.rows, p.head_dim_v);
  }
  if (item.slot < 0) run.kernels.finish(p, block, state, 0, u.rows);
}

void run_part(void* context, int part) {
  const Run& run = *(const Run*)context;
  Scratch& scratch = workspace.ready();
  int packed = -1;  // unit whose queries the scratch holds
  Block block;
  for (int i = run.schedule.parts[part]; i < run.schedule.parts[part + 1]; ++i) {
    const Item& item = run.schedule.items[i];
    if (item.unit != packed) {
      block = block_of(run, run.schedule.units[item.unit]);
      run.kernels.pack_query(run.call.problem, block, scratch);
      packed = item.unit;
    }
    attend_item(run, item, block, scratch);
  }
}

void run_merge(void* context, int task) {
  const Run& run = *(const Run*)context;
  const Merge& merge = run.schedule.merges[task / run.merge_blocks];
  const Unit& u = run.schedule.units[merge.unit];
  const int first = task % run.merge_blocks * kMergeRows;
  if (first >= u.rows) return;
  const int rows = std::min(kMergeRows, u.rows - first);
  const State into = run.slot(merge.first_slot);
  for (int i = 1; i < merge.slots; ++i)
    run.kernels.fold(into, run.slot(merge.first_slot + i), first, rows, run.call.problem.head_dim_v);
  run.kernels.finish(run.call.problem, block_of(run, u), into, first, rows);
}

// The caller's index tensors as they were when the call began. Another thread, or an out that shares their memory, may
// change them while the kernel runs: what was checked must be what is followed.
struct Snapshot {
  std::vector<int32_t> lengths, first_query, table;
};
thread_local Snapshot snapshot;

void copy_lengths(Call& call) {
  snapshot.lengths.assign(call.lengths, call.lengths + call.shape.batch);
  call.lengths = snapshot.lengths.data();
  if (!call.shape.ragged) return;
  snapshot.first_query.assign(call.first_query, call.first_query + call.shape.batch + 1);
  call.first_query = snapshot.first_query.data();
}

// Copies the table entries in use, each checked as copied.
Fault copy_table(Call& call) {
  Problem& p = call.problem;
  const int64_t most = (int64_t)call.max_blocks * p.page_size;
  int64_t longest = 0;
  for (int i = 0; i < call.shape.batch; ++i) {
    if (call.lengths[i] > most) return {Fault::kLengths, i, 0, call.lengths[i]};
    longest = std::max<int64_t>(longest, call.lengths[i]);
  }
  const ptrdiff_t width = (longest + p.page_size - 1) / p.page_size;
  if (snapshot.table.size() < (size_t)width * call.shape.batch) snapshot.table.resize((size_t)width * call.shape.batch);
  for (int i = 0; i < call.shape.batch; ++i) {
    const int32_t* row = p.table + i * p.table_row;
    int32_t* copy = snapshot.table.data() + i * width;
    const int pages = (int)(((int64_t)call.lengths[i] + p.page_size - 1) / p.page_size);
    for (int j = 0; j < pages; ++j) {
      copy[j] = row[j];
      if ((uint32_t)copy[j] >= (uint32_t)call.num_blocks) return {Fault::kTable, i, j, copy[j]};
    }
  }
  p.table = snapshot.table.data();
  p.table_row = width;
  return {};
}

bool made_for(const Schedule& plan, const Call& call) {
  const bool ragged = call.shape.ragged;
  return plan.shape == call.shape && std::equal(plan.lengths.begin(), plan.lengths.end(), call.lengths) &&
         (!ragged || std::equal(plan.first_query.begin(), plan.first_query.end(), call.first_query));
}

}  // namespace

Fault check_lengths(const Shape& shape, const int32_t* lengths, const int32_t* first_query, int64_t total_queries) {
  for (int i = 0; i < shape.batch; ++i)
    if (lengths[i] < 0) return {Fault::kLengths, i, 0, lengths[i]};
  int64_t queries = (int64_t)shape.batch * shape.queries;
  if (shape.ragged) {
    if (first_query[0] != 0) return {Fault::kQueries, 0, 0, first_query[0]};
    for (int i = 0; i < shape.batch; ++i)
      if (first_query[i + 1] < first_query[i]) return {Fault::kQueries, i + 1, 0, first_query[i + 1]};
    queries = first_query[shape.batch];
    if (total_queries >= 0 && queries != total_queries) return {Fault::kQueries, shape.batch, 0, queries};
  }
  // A plan has no tensors yet whose memory would bound what the schedule takes.
  const int64_t most_rows = total_queries < 0 ? kMostPlannedRows : INT32_MAX;
  if (queries > most_rows / shape.heads_q) return {Fault::kTooLarge, 0, 0, queries};
  return {};
}

Fault decode(const Call& asked, const Schedule* plan) {
  Call call = asked;
  copy_lengths(call);
  Fault fault = check_lengths(call.shape, call.lengths, call.first_query, call.total_queries);
  if (!fault.kind) fault = copy_table(call);
  if (!fault.kind && plan && !made_for(*plan, call)) fault.kind = Fault::kPlan;
  if (fault.kind) return fault;
  if (!plan) {
    make_schedule(call.shape, call.lengths, call.first_query, call.threads, own_schedule);
    plan = &own_schedule;
  }
  if (plan->units.empty()) return {};
  Isa& isa = chosen_isa();
  const size_t slot_floats = state_floats(plan->slot_rows, call.problem.head_dim_v);
  const int merge_blocks = (plan->slot_rows + kMergeRows - 1) / kMergeRows;
  Run run{call, *plan, *isa.kernels, slot_memory.need(slot_floats * plan->slots), slot_floats, merge_blocks};
  run_parallel(call.threads, (int)plan->parts.size() - 1, run_part, &run);
  run_parallel(call.threads, (int)plan->merges.size() * merge_blocks, run_merge, &run);
  isa.launches.fetch_add(1, std::memory_order_relaxed);
  return {};
}

}  // namespace hal_cpu
