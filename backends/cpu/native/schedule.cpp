#include "schedule.h"

#include <algorithm>

#include "problem.h"

namespace hal_cpu {
namespace {

// Parts a thread, so that one slowed down by the rest of the machine leaves work to the others. Each cut costs a merge.
constexpr int kPartsPerThread = 4;
// Multiply-adds below which another thread at work is not worth it: some ten microseconds.
constexpr double kLeastShare = 6e5;
// And below which a thread has one part: in a hundred microseconds little is lost to the rest of the machine.
constexpr double kLeastPart = 1e7;
// Converting a token costs about as much as this many rows.
constexpr int kTokenRows = 4;
// batch_invariant: where chunks end may depend on the sequence's own length only. Few enough chunks that their states
// stay small in sum, long enough that folding one is a few percent of computing it.
constexpr int kInvariantChunks = 12;
constexpr int kInvariantTokens = 512;

int round_up(int n, int step) { return (n + step - 1) / step * step; }

int invariant_chunk(int length) {
  return std::max(kInvariantTokens, round_up(length / kInvariantChunks + 1, kTile));
}

double cost(const Shape& s, const Unit& u) {
  // A unit without tokens still writes its rows.
  return (u.end + 1.0) * (round_up(u.rows, 8) + kTokenRows) * (s.head_dim + s.head_dim_v);
}

// Rows are cut to even blocks. With more threads than blocks and long enough pieces, smaller blocks are cheaper than
// more splits over tokens, whose states have to be merged.
int block_rows(const Shape& s, const int32_t* lengths, const Schedule& into, int threads) {
  const int group = s.heads_q / s.heads_kv;
  int rows = kRowBlock;
  for (; rows > kRowBlock / 4; rows /= 2) {
    int64_t pieces = 0;
    for (int i = 0; i < s.batch && pieces < threads; ++i) {
      const int64_t blocks = ((int64_t)into.queries(i) * group + rows - 1) / rows;
      pieces += blocks * s.heads_kv * (lengths[i] / kInvariantTokens + 1);
    }
    if (pieces >= threads) break;
  }
  return rows;
}

void make_units(const Shape& s, const int32_t* lengths, int most_rows, Schedule& into) {
  const int group = s.heads_q / s.heads_kv;
  for (int i = 0; i < s.batch; ++i) {
    const int64_t rows = (int64_t)into.queries(i) * group;
    if (rows == 0) continue;
    const int64_t blocks = (rows + most_rows - 1) / most_rows;
    const int size = std::min<int64_t>(most_rows, round_up((int)((rows + blocks - 1) / blocks), 16));
    const int chunk = s.invariant ? invariant_chunk(lengths[i]) : std::max(lengths[i], 1);
    for (int head = 0; head < s.heads_kv; ++head) {
      for (int64_t first = 0; first < rows; first += size) {
        const int count = (int)std::min<int64_t>(size, rows - first);
        int end = lengths[i];
        if (s.causal) {
          const int64_t last_query = (first + count - 1) / group;
          end = (int)std::max<int64_t>(0, (int64_t)lengths[i] - into.queries(i) + last_query + 1);
        }
        into.units.push_back({i, head, (int)first, count, end, chunk});
        into.slot_rows = std::max(into.slot_rows, round_up(count, 16));
      }
    }
  }
}

// Emits tokens begin … end - 1 of a unit as items of the part being filled.
void emit(Schedule& into, int unit, int begin, int end) {
  const Unit& u = into.units[unit];
  const bool whole = begin == 0 && end == u.end;
  if (whole) return into.items.push_back({unit, begin, end, -1});
  // A run of chunks from the first on is folded where it is computed. Later ones are kept apart: their fold has to
  // start with the chunks of another part.
  if (begin == 0) into.merges.push_back({unit, into.slots, 0});
  const int step = begin == 0 ? end : u.chunk;
  for (int t = begin, count; t < end; t += count) {
    count = std::min(step, end - t);
    into.items.push_back({unit, t, t + count, into.slots++});
    ++into.merges.back().slots;
  }
}

void cut(const Shape& s, int threads, Schedule& into) {
  double total = 0;
  for (const Unit& u : into.units) total += cost(s, u);
  // Invariant chunks each keep a state, so more cuts would cost memory.
  const int most = threads * (s.invariant ? 1 : kPartsPerThread);
  int count = (int)std::max(std::min(total / kLeastShare, (double)threads), std::min(total / kLeastPart, (double)most));
  count = std::max(count, 1);
  // A number of parts that threads share evenly.
  if (count > threads) count -= count % threads;
  double room = total / count, done = 0;
  into.parts.push_back(0);
  for (int i = 0; i < (int)into.units.size(); ++i) {
    const Unit& u = into.units[i];
    const double all = cost(s, u), token = all / (u.end + 1.0);
    const int grain = s.invariant ? u.chunk : kTile / 2;
    int begin = 0;
    // Cut where this part is full, at the nearest legal boundary.
    while (done + (all - token * begin) > room + token * grain / 2 && (int)into.parts.size() < count) {
      const int fit = (int)((room - done) / token / grain + 0.5) * grain;
      const int end = std::min(begin + std::max(fit, 0), u.end);
      if (end > begin) emit(into, i, begin, end);
      done += token * (end - begin);
      begin = end;
      into.parts.push_back((int)into.items.size());
      room = done + (total - done) / (count - (int)into.parts.size() + 1);
      if (begin == u.end) break;
    }
    if (begin < u.end || u.end == 0) emit(into, i, begin, u.end);
    done += all - token * begin;
  }
  into.parts.push_back((int)into.items.size());
}

}  // namespace

void make_schedule(const Shape& shape, const int32_t* lengths, const int32_t* first_query, int threads,
                   Schedule& into) {
  into.shape = shape;
  into.lengths.assign(lengths, lengths + shape.batch);
  into.first_query.clear();
  if (shape.ragged) into.first_query.assign(first_query, first_query + shape.batch + 1);
  into.units.clear();
  into.items.clear();
  into.parts.clear();
  into.merges.clear();
  into.slots = into.slot_rows = 0;
  make_units(shape, lengths, block_rows(shape, lengths, into, threads), into);
  cut(shape, threads, into);
}

}  // namespace hal_cpu
