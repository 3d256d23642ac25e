// Ranks as threads of one process, so that the sanitizers see every access to every window.
// Usage: stress RANKS ROUNDS SEED MASK. Exit 0 if every row and every sum is right.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "engine.h"

using namespace hal_ep;

namespace {

constexpr int kColumns = 96, kTopk = 3, kLocal = 2, kMost = 24;
std::atomic<int> wrong{0};

void expect(bool fine, const char* what, int rank, int round) {
  if (fine || wrong.fetch_add(1) > 20) return;
  std::fprintf(stderr, "rank %d round %d: %s\n", rank, round, what);
}

// The value of every element of a token row: exact in float32 and told apart from all others.
float value(int rank, int round, int64_t token) { return float(rank * 1000 + round % 50 * 16 + int(token)); }

void work(Engine& engine, int rank, int ranks, int rounds, unsigned seed) {
  std::mt19937 random(seed + unsigned(rank));
  std::mt19937 common(seed);
  const int experts = ranks * kLocal;
  std::vector<std::shared_ptr<Operation>> kept;
  for (int round = 0; round < rounds; ++round) {
    const bool expand = common() % 2, late = common() % 2, packed = common() % 3 == 0;
    const int64_t tokens = int64_t(random() % (kMost + 1));
    std::vector<float> x(size_t(tokens * kColumns) + 1);
    std::vector<int64_t> idx(size_t(tokens * kTopk) + 1, -1);
    std::vector<float> weights(size_t(tokens * kTopk) + 1, 0.5f);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int c = 0; c < kColumns; ++c) x[size_t(t * kColumns + c)] = value(rank, round, t);
      for (int k = 0; k < kTopk; ++k) idx[size_t(t * kTopk + k)] = int64_t(random() % unsigned(experts + 1)) - 1;
    }
    std::vector<float> out(size_t(tokens * kColumns) + 1, -1.0f);
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(x.data());
    if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    if (packed) {
      const int64_t slots = int64_t(ranks) * kMost;
      std::vector<int32_t> count(kLocal), stats(kLocal, 0);
      std::vector<int64_t> ranges(size_t(kLocal * ranks)), waits(static_cast<size_t>(ranks), 0);
      PackedCall call;
      call.x = bytes, call.tokens = tokens, call.stride = kColumns * 4, call.columns = kColumns;
      call.type = Type::f32, call.idx = idx.data(), call.topk = kTopk, call.num_experts = experts, call.slots = slots;
      call.stats = stats.data(), call.waits = waits.data(), call.deferred = late;
      call.count = count.data(), call.ranges = ranges.data(), call.begin = {0, tokens};
      auto op = engine.packed_dispatch(call);
      engine.finish(op);
      for (int e = 0; e < kLocal; ++e)
        for (int source = 0; source < ranks; ++source) {
          const int64_t range = ranges[size_t(e * ranks + source)];
          for (int64_t i = range >> 32; i < (range >> 32) + (range & 0xFFFFFFFF); ++i) {
            const auto* row = reinterpret_cast<const float*>(op->slot->data()) + (e * slots + i) * kColumns;
            const auto* info = reinterpret_cast<const int32_t*>(op->slot->data() + op->idx_at) + e * slots;
            for (int c = 0; c < kColumns; ++c)
              expect(row[c] == value(source, round, info[i]), "packed row", rank, round);
          }
        }
      PackedCombineCall back;
      back.x = op->slot->data(), back.columns = kColumns, back.slots = slots, back.type = Type::f32;
      back.routes = op->routes, back.idx = idx.data(), back.weights = weights.data();
      back.out = reinterpret_cast<uint8_t*>(out.data()), back.out_stride = kColumns * 4;
      back.ranges = ranges.data(), back.now = !late;
      engine.finish(engine.packed_combine(back));
      for (int64_t t = 0; t < tokens; ++t) {
        int chosen = 0;
        for (int k = 0; k < kTopk; ++k) chosen += idx[size_t(t * kTopk + k)] >= 0;
        for (int c = 0; c < kColumns; ++c)
          expect(out[size_t(t * kColumns + c)] == 0.5f * float(chosen) * value(rank, round, t), "packed sum", rank,
                 round);
      }
      continue;
    }
    DispatchCall call;
    call.x = bytes, call.tokens = tokens, call.stride = kColumns * 4, call.row_bytes = kColumns * 4;
    call.idx = idx.data(), call.topk = kTopk, call.expand = expand, call.num_experts = experts;
    call.alignment = expand ? 4 : 1, call.weights = weights.data(), call.begin = {0, tokens};
    call.arguments[0] = 1;
    auto op = engine.dispatch(call);
    if (!late) engine.finish(op);
    if (kept.size() > 5) kept.erase(kept.begin());
    kept.push_back(op);
    engine.finish(op);
    CombineCall back;
    std::vector<uint8_t> copy(op->slot->data(), op->slot->data() + op->rows * kColumns * 4);
    back.x = common() % 2 ? op->slot->data() : copy.data();
    back.row_bytes = kColumns * 4, back.columns = kColumns, back.type = back.out_type = Type::f32;
    back.routes = op->routes, back.out = reinterpret_cast<uint8_t*>(out.data()), back.out_stride = kColumns * 4;
    back.now = !late;
    engine.finish(engine.combine(back));
    for (int64_t t = 0; t < tokens; ++t) {
      int copies = 0;
      for (int k = 0; k < kTopk; ++k) copies += op->routes->rank[size_t(t * kTopk + k)] >= 0;
      for (int c = 0; c < kColumns; ++c)
        expect(out[size_t(t * kColumns + c)] == float(copies) * value(rank, round, t), "sum", rank, round);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int ranks = std::atoi(arguments[1]), rounds = std::atoi(arguments[2]);
  const unsigned seed = unsigned(std::strtoul(arguments[3], nullptr, 10));
  const bool mask = std::atoi(arguments[4]) != 0;  // whether places of the low-latency mode are granted
  const uint8_t token[32] = {7};
  std::vector<std::shared_ptr<Engine>> engines;
  for (int rank = 0; rank < ranks; ++rank) {
    Config config{rank, ranks, 1, kLocal, 0, 0, 60.0, mask, 1 << 20, Policy::error, rank % 2 == 0, ranks};
    engines.push_back(std::make_shared<Engine>(config, token));
  }
  for (int rank = 0; rank < ranks; ++rank)
    for (int peer = 0; peer < ranks; ++peer)
      if (peer != rank) engines[size_t(rank)]->attach_direct(peer, engines[size_t(peer)]->window());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&, rank] {
      try {
        work(*engines[size_t(rank)], rank, ranks, rounds, seed);
      } catch (const RankFailed& failure) {
        std::fprintf(stderr, "rank %d: rank %d failed in %s: %s\n", rank, failure.rank, failure.phase.c_str(),
                     failure.reason.c_str());
        ++wrong;
      } catch (const Refused& refused) {
        std::fprintf(stderr, "rank %d: %s: %s\n", rank, refused.argument.c_str(), refused.got.c_str());
        ++wrong;
      }
    });
  for (auto& thread : threads) thread.join();
  for (auto& engine : engines) engine->close();
  std::printf("%d wrong\n", wrong.load());
  return wrong.load() == 0 ? 0 : 1;
}
