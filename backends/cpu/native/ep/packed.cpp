// Low-latency dispatch and combine.
#include "detail.h"

namespace hal_ep {

void Engine::release(const std::shared_ptr<Routes>& routes) {
  std::unique_lock<Gate> hold(api_);
  if (routes->packed_slot >= 0 && packed_[routes->packed_slot].id == routes->id)
    packed_[routes->packed_slot].released = true;
}

std::shared_ptr<Operation> Engine::packed_reserve(const PackedCall& call) {
  std::unique_lock<Gate> hold(api_);
  return reserve(call);
}

// An operation with one of the two slots. One without a slot is refused when it is made.
std::shared_ptr<Operation> Engine::reserve(const PackedCall& call) {
  const int64_t groups = (call.columns + 127) / 128;
  const int64_t row_bytes = call.cast != 0 ? call.columns : call.columns * int64_t(type_bytes(call.type));
  const int64_t scale_words = call.cast == 0 ? 0 : call.cast == 3 ? (groups + 3) / 4 : groups;
  const size_t cells = size_t(config_.experts * call.slots);
  auto op = std::make_shared<Operation>();
  op->routes = std::make_shared<Routes>();
  op->routes->packed = true;
  op->scales_at = up64(cells * size_t(row_bytes));
  op->idx_at = op->scales_at + up64(cells * size_t(scale_words) * 4);
  const size_t bytes = op->idx_at + up64(cells * 4);
  int chosen = -1;
  for (int i = 0; i < 2; ++i)
    if (chosen < 0 && (packed_[i].released || packed_[i].use.expired())) chosen = i;
  if (chosen < 0) return op;
  PackedSlot& slot = packed_[chosen];
  if (!slot.lease || slot.lease->bytes < bytes) {
    slot.lease.reset();
    slot.lease = arena_->take(bytes, false);
  }
  op->slot = slot.lease;
  op->use = std::make_shared<int>(chosen);
  slot.use = op->use;
  slot.released = false;
  slot.id = 0;
  op->routes->packed_slot = chosen;
  return op;
}

std::shared_ptr<Operation> Engine::packed_dispatch(const PackedCall& call) {
  std::unique_lock<Gate> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  enter();
  Text bad;
  bool fine = true;
  std::shared_ptr<Operation> op = call.reserved;
  if (!op) {
    try {
      op = reserve(call);
    } catch (const SystemError& error) {
      fine = false;
      op = std::make_shared<Operation>();
      op->routes = std::make_shared<Routes>();
      set_text(bad, "max_tokens_per_rank", error.what(), "what fits in memory");
    }
  }
  if (fine && !op->slot) {
    fine = false;
    set_text(bad, "low_latency_dispatch",
             "a third result while two are live on rank " + number(config_.rank),
             "at most two: combine one, or let go of it, first");
  }
  const std::shared_ptr<Routes> routes = op->routes;
  routes->tokens = call.tokens;
  routes->topk = call.topk;
  routes->packed = true;
  routes->begin = call.begin;
  fine = fine && route(*routes, call.idx, call.num_experts, &bad);
  const int64_t groups = (call.columns + 127) / 128;
  const int64_t row_bytes = call.cast != 0 ? call.columns : call.columns * int64_t(type_bytes(call.type));
  const int64_t scale_words = call.cast == 0 ? 0 : call.cast == 3 ? (groups + 3) / 4 : groups;
  begin(Kind::low_latency_dispatch, op);
  routes->id = op->seq;
  if (routes->packed_slot >= 0) packed_[routes->packed_slot].id = op->seq;
  if (!fine && routes->packed_slot >= 0) packed_[routes->packed_slot].released = true;
  const bool told = fine && !granting();
  post(*op, call.arguments, fine ? routes.get() : nullptr, told ? op->slot->offset : 0,
       told ? uint64_t(call.slots) : 0, 0, fine ? nullptr : &bad, 0);
  auto posted = [this, raw = op.get()](int peer) {
    return post_from(peer, raw->seq).seq.load(std::memory_order_seq_cst) >= raw->seq * 4;
  };
  bool now = !call.deferred || !fine;
  for (int turn = 0; !now && turn < (config_.crowded ? 1 : 1000); ++turn) {
    now = true;
    for (int peer = 0; peer < config_.ranks && now; ++peer) now = !alive(peer) || posted(peer);
    if (!now) relax();
  }
  if (now) {
    packed_body(*op, call);
  } else {
    // The others are late: the rest is done behind the caller's back, from a copy of what he may change meanwhile.
    PackedCall later = call;
    later.stride = call.columns * int64_t(type_bytes(call.type));
    op->copy.resize(size_t(call.tokens * later.stride));
    for (int64_t token = 0; token < call.tokens; ++token)
      std::memcpy(op->copy.data() + token * later.stride, call.x + token * call.stride, size_t(later.stride));
    later.x = op->copy.data();
    // Nobody waits here yet: the hook takes what falls into its own time.
    op->job_waits.assign(size_t(config_.ranks), 0);
    op->job_start = Clock::now();
    later.waits = op->job_waits.data();
    later.reserved = nullptr;  // the operation is not to hold itself
    job_ = [this, op, later] {
      try {
        packed_body(*op, later);
      } catch (...) {
        op->error = std::current_exception();
      }
    };
    job_running_ = true;
    if (!worker_.joinable()) worker_ = std::thread([this] { run_worker(); });
    idle_.notify_all();
  }
  Operation* raw = op.get();
  PackedCall kept = call;
  kept.reserved = nullptr;
  op->complete = [this, raw, kept, row_bytes, scale_words] {
    if (raw->error) std::rethrow_exception(raw->error);
    const auto asked = asked_;
    receive(*raw, kept.waits);
    for (size_t peer = 0; kept.waits != nullptr && peer < raw->job_waits.size(); ++peer) {
      const auto came = raw->job_start + std::chrono::microseconds(raw->job_waits[peer]);
      if (came > asked)
        kept.waits[peer] += std::chrono::duration_cast<std::chrono::microseconds>(came - asked).count();
    }
    const int blocks = config_.sources * config_.ranks;
    for (int peer = 0; config_.mask && peer < config_.ranks; ++peer) {
      if (!lost(*raw, peer)) continue;
      if (!dead(peer)) {
        abandoned_.push_back(raw->slot);
        PackedSlot& slot = packed_[raw->routes->packed_slot];
        if (slot.lease == raw->slot) slot.lease.reset();
      }
      uint8_t* data = raw->slot->data();
      for (int e = 0; e < config_.experts; ++e)
        for (int block = peer; block < blocks; block += config_.ranks) {
          const int64_t range = kept.ranges[e * blocks + block], at = range >> 32, count = range & 0xFFFFFFFF;
          std::memset(data + (e * kept.slots + at) * row_bytes, 0, size_t(count * row_bytes));
          auto* scales = reinterpret_cast<uint32_t*>(data + raw->scales_at) + e * scale_words * kept.slots;
          for (int64_t g = 0; g < scale_words; ++g) std::fill_n(scales + g * kept.slots + at, count, 0u);
          std::fill_n(reinterpret_cast<int32_t*>(data + raw->idx_at) + e * kept.slots + at, count, -1);
        }
    }
    if (kept.stats != nullptr)
      for (int e = 0; e < config_.experts; ++e) kept.stats[e] += kept.count[e];
  };
  pending_.push_back(op);
  return op;
}

// What a rank sends to each of a destination's experts, source by source.
const uint32_t* Engine::packed_counts(int peer, uint64_t seq, int destination) const {
  const uint32_t* counts = post_rows(post_from(peer, seq));
  return counts + (granting() ? size_t(config_.sources) : size_t(destination) * size_t(config_.experts));
}

// As a source: of each destination and expert the row at which this rank's begin, after those of the ranks before it.
void Engine::find_starts(const Operation& op, std::vector<uint32_t>& starts) const {
  for (int before = 0; before < config_.rank; ++before) {
    const uint32_t* counts = packed_counts(before, op.seq, 0);
    for (size_t i = 0; i < starts.size(); ++i) starts[i] += counts[i];
  }
}

// As a destination: count what will come, and find where the rows of each source lie.
void Engine::count_packed(Operation& op, const PackedCall& call) {
  const int ranks = config_.ranks;
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
  for (int peer = 0; peer < ranks; ++peer) op.granted[size_t(peer)] = alive(peer);
  for (size_t e = 0; e < experts; ++e) {
    uint64_t at = 0;
    for (size_t s = 0; s < sources; ++s)
      for (int peer = 0; peer < ranks; ++peer) {
        uint32_t count = alive(peer) ? packed_counts(peer, op.seq, config_.rank)[s * experts + e] : 0;
        call.ranges[(e * sources + s) * size_t(ranks) + size_t(peer)] = int64_t(at << 32 | count);
        at += count;
        op.expected[size_t(peer)] += count;
        if (count != 0 && op.first_expert[size_t(peer)] < 0)
          op.first_expert[size_t(peer)] = int(config_.expert_base + config_.rank * config_.experts + int64_t(e));
      }
    if (at > uint64_t(call.slots)) {
      RankFailed failure;
      failure.rank = config_.rank;
      failure.phase = kind_name(op.kind);
      failure.reason = "more rows announced than the slots hold";
      fail(failure);
    }
    call.count[e] = int32_t(at);
  }
}

void Engine::packed_body(Operation& op, const PackedCall& call) {
  wait(kPost, op, call.waits, [&](int peer) {
    return post_from(peer, op.seq).seq.load(std::memory_order_seq_cst) >= op.seq * 4;
  });
  check_posts(op, 0);
  const int ranks = config_.ranks;
  const size_t experts = size_t(config_.experts), per_source = size_t(config_.sources) * experts;
  count_packed(op, call);
  std::vector<uint32_t> starts(size_t(ranks) * per_source, 0);
  if (granting()) {
    for (size_t block = 0; block < per_source; ++block) {
      const size_t e = block % experts, s = block / experts;
      for (size_t peer = 0; peer < size_t(ranks); ++peer)
        starts[peer * per_source + block] =
            uint32_t(call.ranges[(e * size_t(config_.sources) + s) * size_t(ranks) + peer] >> 32);
    }
    give(op, 0, Status::ok, op.slot->offset, uint64_t(call.slots), 0, starts, per_source);
    check_grants(op, 0, nullptr);
  } else {
    find_starts(op, starts);
  }
  note(op, kPush, -1, false);
  if (!faults_.empty()) fault(kPush, op.seq, -1);
  Routes& routes = *op.routes;
  const int64_t groups = (call.columns + 127) / 128;
  const int64_t row_bytes = call.cast != 0 ? call.columns : call.columns * int64_t(type_bytes(call.type));
  const int64_t scale_words = call.cast == 0 ? 0 : call.cast == 3 ? (groups + 3) / 4 : groups;
  std::vector<uint8_t> scratch(call.cast != 0 ? size_t(row_bytes) : 0);
  std::vector<uint32_t> scales(size_t(scale_words) + 1, 0);
  struct Target {
    uint8_t* base = nullptr;
    const uint32_t* starts = nullptr;  // [sources][L]
    bool skip = true;
    uint32_t written = 0;
  };
  std::vector<Target> targets(static_cast<size_t>(ranks));
  uint64_t total = 0;
  for (int peer = 0; peer < ranks; ++peer) {
    if (!alive(peer)) continue;
    const Grant& grant = grant_from(peer, op.seq);
    const Post& post = post_from(peer, op.seq);
    const uint64_t offset = granting() ? grant.offset : post.offset, rows = granting() ? grant.rows : post.bytes;
    const size_t bytes = op.idx_at + up64(experts * size_t(call.slots) * 4);
    Window& window = *peers_[size_t(peer)].window;
    if (rows != uint64_t(call.slots) || offset < map_.end || !window.contains(offset, bytes)) {
      RankFailed failure;
      failure.rank = peer;
      failure.phase = kind_name(op.kind);
      failure.reason = "the memory it names lies outside its window";
      fail(failure);
    }
    targets[size_t(peer)] = {
        window.at(offset),
        granting() ? reinterpret_cast<const uint32_t*>(&grant + 1) : &starts[size_t(peer) * experts],
        !faults_.empty() && peer != config_.rank && fault(kPush, op.seq, peer)};
    for (size_t b = 0; b < per_source; ++b) total += routes.experts_to[size_t(peer) * per_source + b];
  }
  const bool streaming = total * uint64_t(row_bytes) >= kStreamFrom;
  auto tell_progress = [&] {
    for (int peer = 0; peer < ranks; ++peer)
      if (alive(peer))
        flags_at(peer).progress.store((op.seq & 0xFFFFFFFF) << 32 | targets[size_t(peer)].written,
                                      std::memory_order_relaxed);
  };
  size_t source = 0;
  for (int64_t token = 0; token < call.tokens; ++token) {
    while (token >= routes.begin[source + 1]) ++source;
    const uint8_t* row = call.x + token * call.stride;
    const size_t at = size_t(token * call.topk);
    bool cast_done = false;
    for (int64_t k = 0; k < call.topk; ++k) {
      const int32_t peer = routes.rank[at + size_t(k)];
      if (peer < 0 || !alive(peer)) continue;
      const int32_t slot = routes.expert[at + size_t(k)];
      const size_t local = size_t(slot - peer * int32_t(experts));
      Target& target = targets[size_t(peer)];
      const uint64_t in_expert =
          uint64_t(target.starts[source * experts + local]) + uint64_t(routes.order[at + size_t(k)]);
      if (in_expert >= uint64_t(call.slots)) continue;  // only damaged mail leads here
      const uint64_t to = local * uint64_t(call.slots) + in_expert;
      routes.row[at + size_t(k)] = int32_t(to);
      bool again = false;
      for (int64_t j = 0; j < k; ++j) again = again || routes.expert[at + size_t(j)] == slot;
      if (again || target.skip) continue;
      if (call.cast != 0 && !cast_done) {
        cast_fp8(scratch.data(), scales.data(), row, call.type, size_t(call.columns), call.cast >= 2, call.cast == 3);
        row = scratch.data();
        cast_done = true;
      }
      uint8_t* base = target.base;
      if (streaming)
        copy_streaming(base + to * uint64_t(row_bytes), row, size_t(row_bytes));
      else
        std::memcpy(base + to * uint64_t(row_bytes), row, size_t(row_bytes));
      auto* out = reinterpret_cast<uint32_t*>(base + op.scales_at) + local * uint64_t(scale_words * call.slots);
      for (int64_t g = 0; g < scale_words; ++g) out[uint64_t(g * call.slots) + in_expert] = scales[size_t(g)];
      reinterpret_cast<int32_t*>(base + op.idx_at)[to] =
          call.positions != nullptr ? call.positions[token] : int32_t(token);
      ++target.written;
    }
    if ((token & 63) == 63) tell_progress();
  }
  tell_progress();
  send_done(op);
}

std::shared_ptr<Operation> Engine::packed_combine(const PackedCombineCall& call) {
  std::unique_lock<Gate> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  enter();
  const Routes& routes = *call.routes;
  auto op = begin(Kind::low_latency_combine);
  op->routes = call.routes;
  if (!faults_.empty()) fault(kStage, op->seq, -1);
  Text bad;
  PackedSlot* slot = routes.packed_slot < 0 ? nullptr : &packed_[routes.packed_slot];
  bool fine = slot == nullptr || slot->id == routes.id;
  if (!fine) {
    slot = nullptr;  // another result's by now
    set_text(bad, "handle", "one that was combined, and whose memory a later dispatch has taken, on rank " + number(config_.rank),
             "one of a result that is live");
  }
  for (size_t i = 0; fine && i < size_t(routes.tokens * routes.topk); ++i) {
    const int64_t expert = call.idx[i] - config_.expert_base;
    const bool here = call.idx[i] >= 0 && expert >= 0 && expert < int64_t(config_.experts) * config_.ranks;
    // An expert of another node is another engine's business.
    if (here ? expert == routes.expert[i] : call.idx[i] < 0 || routes.expert[i] < 0) continue;
    fine = false;
    set_text(bad, "topk_idx", std::to_string(call.idx[i]) + " at entry " + std::to_string(i) + " on rank " +
             number(config_.rank), "what the dispatch of this handle was given, or -1");
  }
  const size_t row_bytes = size_t(call.columns) * type_bytes(call.type);
  const size_t bytes = size_t(config_.experts * call.slots) * row_bytes;
  std::shared_ptr<Lease> lease = call.lent;
  if (fine && !lease) {
    try {
      lease = arena_->take(bytes, false);
    } catch (const SystemError&) {
      fine = false;
      set_text(bad, "x", std::to_string(bytes) + " bytes to stage", "what fits in memory");
    }
    if (fine) {
      const size_t blocks = size_t(config_.sources) * size_t(config_.ranks);
      uint64_t total = 0;
      for (size_t i = 0; i < blocks * size_t(config_.experts); ++i) total += uint64_t(call.ranges[i] & 0xFFFFFFFF);
      // Ranges of an expert lie end to end from 0, source by source.
      for (size_t e = 0; e < size_t(config_.experts); ++e)
        for (size_t b = 0; b < blocks; ++b) {
          if (call.now && int(b % size_t(config_.ranks)) == config_.rank) continue;
          const int64_t range = call.ranges[e * blocks + b];
          const size_t at = (e * size_t(call.slots) + size_t(range >> 32)) * row_bytes;
          const size_t size = size_t(range & 0xFFFFFFFF) * row_bytes;
          if (total * row_bytes >= kStreamFrom)
            copy_streaming(lease->data() + at, call.x + at, size);
          else
            std::memcpy(lease->data() + at, call.x + at, size);
        }
      fence();
    }
  }
  post(*op, call.arguments, nullptr, fine ? lease->offset : 0, fine ? bytes : 0, 0, fine ? nullptr : &bad, 0);
  stages_.push_back({op->seq, lease});
  const bool used = slot != nullptr && slot->released;
  if (slot != nullptr) slot->released = true;
  Operation* raw = op.get();
  op->complete = [this, raw, call, row_bytes, slot, used] {
    const Routes& way = *call.routes;
    try {
      fetch(*raw, call.waits);
    } catch (const Refused&) {
      // Nothing was combined: the same result may be, by a call that is right.
      if (slot != nullptr && slot->id == way.id) slot->released = used;
      throw;
    }
    const uint64_t cells = uint64_t(config_.experts * call.slots);
    std::vector<const void*> rows(size_t(way.topk) + 1);
    std::vector<float> weights(size_t(way.topk) + 1);
    for (int64_t token = 0; token < way.tokens; ++token) {
      int count = 0;
      for (int64_t k = 0; k < way.topk; ++k) {
        const size_t at = size_t(token * way.topk + k);
        const int32_t peer = way.rank[at];
        if (peer < 0 || way.row[at] < 0 || !alive(peer) || call.idx[at] < 0) continue;
        if (uint64_t(way.row[at]) >= cells || post_from(peer, raw->seq).bytes < cells * row_bytes) continue;
        const uint8_t* from = call.now && peer == config_.rank
                                  ? call.x + size_t(way.row[at]) * row_bytes
                                  : fetched_row(peer, raw->seq, way.row[at], int64_t(row_bytes));
        if (call.gather) {
          std::memcpy(call.out + at * row_bytes, from, row_bytes);
          continue;
        }
        rows[size_t(count)] = from;
        weights[size_t(count++)] = call.weights[at];
      }
      if (call.gather) continue;
      reduce(call.out + token * call.out_stride, call.type, rows.data(), weights.data(), count, nullptr, nullptr,
             call.type, size_t(call.columns));
    }
    acknowledge(*raw);
  };
  pending_.push_back(op);
  return op;
}

}  // namespace hal_ep
