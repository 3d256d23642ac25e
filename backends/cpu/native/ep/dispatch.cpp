// Normal dispatch.
#include "detail.h"

namespace hal_ep {

bool Engine::route(Routes& routes, const int64_t* idx, int64_t num_experts, Text* bad) const {
  const int64_t topk = routes.topk, local = config_.experts, here = local * config_.ranks;
  const size_t sources = size_t(config_.sources);
  const size_t entries = size_t(routes.tokens * topk);
  routes.rank.assign(entries, -1);
  routes.order.assign(entries, 0);
  routes.expert.assign(entries, -1);
  routes.row.assign(entries, -1);
  routes.rows_to.assign(size_t(config_.ranks) * sources, 0);
  routes.experts_to.assign(size_t(config_.ranks) * sources * size_t(local), 0);
  const bool by_expert = routes.expand || routes.packed;
  // Of each expert the token that chose it last and with which choice, of each rank the token that went there last.
  struct Seen {
    int64_t token = -1, k = 0;
  };
  std::vector<Seen> expert_seen(static_cast<size_t>(here));
  std::vector<int64_t> rank_seen(size_t(config_.ranks), -1);
  std::vector<int32_t> owner(static_cast<size_t>(here));
  for (int64_t e = 0; e < here; ++e) owner[size_t(e)] = int32_t(e / local);
  for (size_t source = 0; source < sources; ++source) {
    for (int64_t token = routes.begin[source]; token < routes.begin[source + 1]; ++token) {
      const size_t at = size_t(token * topk);
      for (int64_t k = 0; k < topk; ++k) {
        int64_t expert = idx[at + size_t(k)];
        if (expert == -1) continue;
        if (expert < -1 || expert >= num_experts) {
          set_text(*bad, "topk_idx",
                   std::to_string(expert) + " at [" + std::to_string(token) + ", " + std::to_string(k) + "] on rank " +
                       number(config_.rank),
                   "-1 (no expert) or 0…" + std::to_string(num_experts - 1));
          return false;
        }
        expert -= config_.expert_base;
        if (expert < 0 || expert >= here) continue;
        const int32_t rank = owner[size_t(expert)];
        routes.expert[at + size_t(k)] = int32_t(expert);
        Seen& seen = expert_seen[size_t(expert)];
        const bool same_expert = seen.token == token, same_rank = rank_seen[size_t(rank)] == token;
        if (!same_expert) seen = {token, k};
        rank_seen[size_t(rank)] = token;
        const size_t block = size_t(rank) * sources + source;
        uint32_t& per_expert = routes.experts_to[block * size_t(local) + size_t(expert - int64_t(rank) * local)];
        uint32_t& per_rank = routes.rows_to[block];
        if (by_expert) {
          if (!same_expert) {
            routes.rank[at + size_t(k)] = rank;
            routes.order[at + size_t(k)] = int32_t(per_expert);
          } else if (routes.packed) {
            routes.rank[at + size_t(k)] = rank;
            routes.order[at + size_t(k)] = routes.order[at + size_t(seen.k)];
          }
        } else if (!same_rank) {
          routes.rank[at + size_t(k)] = rank;
          routes.order[at + size_t(k)] = int32_t(per_rank);
        }
        per_expert += !same_expert;
        per_rank += !same_rank;
      }
    }
  }
  return true;
}

// As a destination: with all counts at hand, allocate what will come and tell every source its places. False: the
// rows do not fit and the sources were told how many to send; they post again.
bool Engine::grant(Operation& op, const DispatchCall& call, int round) {
  const int ranks = config_.ranks;
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
  Routes& routes = *op.routes;
  int64_t total = 0;
  std::vector<int64_t> per_expert(experts, 0);
  for (int peer = 0; peer < ranks; ++peer) {
    op.expected[size_t(peer)] = 0;
    op.granted[size_t(peer)] = alive(peer);
    if (!alive(peer)) continue;
    const uint32_t* rows = post_rows(post_from(peer, op.seq));
    for (size_t s = 0; s < sources; ++s) {
      total += rows[s];
      op.expected[size_t(peer)] += rows[s];
      for (size_t e = 0; e < experts; ++e) {
        uint32_t count = rows[sources + s * experts + e];
        per_expert[e] += count;
        if (count != 0 && op.first_expert[size_t(peer)] < 0)
          op.first_expert[size_t(peer)] = int(config_.expert_base + config_.rank * config_.experts + int64_t(e));
      }
    }
  }
  std::vector<uint32_t> starts;
  if (config_.policy == Policy::drop && total > config_.room) {
    routes.dropped += total - config_.room;
    starts.assign(size_t(ranks) * sources, 0);
    int64_t left = config_.room;
    for (size_t s = 0; s < sources; ++s)
      for (int peer = 0; peer < ranks; ++peer) {
        if (!alive(peer)) continue;
        int64_t fits = std::min<int64_t>(left, post_rows(post_from(peer, op.seq))[s]);
        starts[size_t(peer) * sources + s] = uint32_t(fits);
        left -= fits;
      }
    give(op, round, Status::shorten, 0, 0, 0, starts, sources);
    return false;
  }
  int64_t rows = total;
  routes.recv_experts.assign(experts, 0);
  std::vector<int64_t> group(experts, 0);
  int64_t aligned = 0;
  for (size_t e = 0; e < experts; ++e) {
    routes.recv_experts[e] = (per_expert[e] + call.alignment - 1) / call.alignment * call.alignment;
    group[e] = aligned;
    aligned += routes.recv_experts[e];
  }
  if (call.expand) rows = aligned;
  const bool worst = call.worst > 0;
  if ((worst && rows > call.worst) || (config_.policy == Policy::error && total > config_.room) || rows > INT32_MAX) {
    // The room a worst-case call states is its own.
    give(op, round, Status::overflow, uint64_t(worst && rows > call.worst ? call.worst : 0),
         uint64_t(rows > INT32_MAX ? rows : 0), uint64_t(total), starts, 0);
    return true;
  }
  if (worst) rows = call.worst;
  const int64_t columns = call.expand ? 1 : call.topk;
  op.rows = rows;
  op.x_at = 0;
  op.scales_at = up64(size_t(rows * call.row_bytes));
  op.idx_at = op.scales_at + up64(size_t(rows * call.scale_bytes));
  op.weights_at = op.idx_at + up64(size_t(rows * columns) * 8);
  op.source_at = op.weights_at + (call.arguments[0] ? up64(size_t(rows * columns) * 4) : 0);
  const size_t bytes = op.source_at + up64(size_t(rows) * sizeof(Source));
  try {
    op.slot = arena_->take(bytes);
  } catch (const SystemError&) {
    give(op, round, Status::refused, 0, uint64_t(rows), bytes, starts, 0);
    return true;
  }
  routes.recv_rows = rows;
  uint8_t* slot = op.slot->data();
  auto* idx = reinterpret_cast<int64_t*>(slot + op.idx_at);
  auto* weights = reinterpret_cast<float*>(slot + op.weights_at);
  auto* source = reinterpret_cast<Source*>(slot + op.source_at);
  auto nobody = [&](int64_t from, int64_t to) {
    std::fill(source + from, source + to, Source{});
    std::fill(idx + from * columns, idx + to * columns, int64_t(-1));
    if (call.arguments[0]) std::fill(weights + from * columns, weights + to * columns, 0.0f);
  };
  auto blank = [&](int64_t from, int64_t to) {
    std::memset(slot + from * call.row_bytes, 0, size_t((to - from) * call.row_bytes));
    std::memset(slot + op.scales_at + size_t(from * call.scale_bytes), 0, size_t((to - from) * call.scale_bytes));
    nobody(from, to);
  };
  const size_t blocks = sources * size_t(ranks);
  routes.came.assign(blocks, 0);
  routes.came_for.assign(blocks * experts, 0);
  for (int peer = 0; peer < ranks; ++peer) {
    if (!alive(peer)) continue;
    const uint32_t* rows_of = post_rows(post_from(peer, op.seq));
    for (size_t s = 0; s < sources; ++s) {
      const size_t block = s * size_t(ranks) + size_t(peer);
      routes.came[block] = rows_of[s];
      std::copy_n(rows_of + sources + s * experts, experts, &routes.came_for[block * experts]);
    }
  }
  const size_t all = size_t(config_.all_ranks);
  routes.sent.assign(blocks * all, 0);
  for (int peer = 0; peer < ranks; ++peer)
    if (alive(peer))
      for (size_t s = 0; s < sources; ++s)
        std::copy_n(post_rows(post_from(peer, op.seq)) + sources * (1 + experts) + s * all, all,
                    &routes.sent[(s * size_t(ranks) + size_t(peer)) * all]);
  routes.came_at.clear();
  routes.came_at.reserve(call.expand ? blocks * experts : blocks);
  routes.own.clear();
  auto own = [&](int peer, int64_t from, int64_t count) {
    if (peer == config_.rank && count != 0) routes.own.emplace_back(from, from + count);
  };
  const size_t per_source = call.expand ? sources * experts : sources;
  starts.assign(size_t(ranks) * per_source, 0);
  if (call.expand) {
    for (size_t e = 0; e < experts; ++e) {
      int64_t at = group[e];
      for (size_t s = 0; s < sources; ++s)
        for (int peer = 0; peer < ranks; ++peer) {
          const uint32_t count = routes.came_for[(s * size_t(ranks) + size_t(peer)) * experts + e];
          routes.came_at.emplace_back(at, count);
          starts[size_t(peer) * per_source + s * experts + e] = uint32_t(at);
          own(peer, at, count);
          at += count;
        }
      blank(at, group[e] + routes.recv_experts[e]);
    }
    nobody(aligned, rows);
  } else {
    int64_t at = 0;
    for (size_t s = 0; s < sources; ++s)
      for (int peer = 0; peer < ranks; ++peer) {
        const uint32_t count = routes.came[s * size_t(ranks) + size_t(peer)];
        routes.came_at.emplace_back(at, count);
        starts[size_t(peer) * sources + s] = uint32_t(at);
        own(peer, at, count);
        at += count;
      }
    nobody(at, rows);
  }
  give(op, round, Status::ok, op.slot->offset, uint64_t(rows), 0, starts, per_source);
  return true;
}

void Engine::shorten(Operation& op, const std::vector<int>& where) {
  Routes& routes = *op.routes;
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
  for (int peer : where) {
    const auto* accept = reinterpret_cast<const uint32_t*>(&grant_from(peer, op.seq) + 1);
    for (size_t s = 0; s < sources; ++s) {
      const size_t block = size_t(peer) * sources + s;
      uint32_t seen = 0;
      for (int64_t token = routes.begin[s]; token < routes.begin[s + 1]; ++token) {
        int32_t* rank = &routes.rank[size_t(token * routes.topk)];
        const int32_t* expert = &routes.expert[size_t(token * routes.topk)];
        bool goes = false;
        for (int64_t k = 0; k < routes.topk; ++k) goes = goes || rank[k] == peer;
        if (!goes || seen++ < accept[s]) continue;
        for (int64_t k = 0; k < routes.topk; ++k) {
          if (expert[k] < 0 || expert[k] / int32_t(experts) != peer) continue;
          bool again = std::find(expert, expert + k, expert[k]) != expert + k;
          if (!again) --routes.experts_to[block * experts + size_t(expert[k] % int32_t(experts))];
          rank[k] = -1;
        }
      }
      routes.rows_to[block] = std::min(routes.rows_to[block], accept[s]);
    }
  }
}

void Engine::push(Operation& op, const DispatchCall& call, const int64_t*) {
  note(op, kPush, -1, false);
  if (!faults_.empty()) fault(kPush, op.seq, -1);
  Routes& routes = *op.routes;
  const int ranks = config_.ranks;
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
  const bool weighted = call.weights != nullptr;
  const int64_t columns = call.expand ? 1 : call.topk;
  struct Target {
    uint8_t *x, *scales;
    int64_t* idx;
    float* weights;
    Source* source;
    const uint32_t* starts;
    uint64_t rows;
    bool skip;
    uint32_t written = 0;
  };
  std::vector<Target> targets(static_cast<size_t>(ranks));
  uint64_t total = 0;
  for (int peer = 0; peer < ranks; ++peer) {
    Target& target = targets[size_t(peer)];
    target.skip = true;
    if (!alive(peer)) continue;
    const Grant& mail = grant_from(peer, op.seq);
    const size_t scales_at = up64(size_t(mail.rows) * size_t(call.row_bytes));
    const size_t idx_at = scales_at + up64(size_t(mail.rows) * size_t(call.scale_bytes));
    const size_t weights_at = idx_at + up64(size_t(mail.rows) * size_t(columns) * 8);
    const size_t source_at = weights_at + (weighted ? up64(size_t(mail.rows) * size_t(columns) * 4) : 0);
    const size_t bytes = source_at + up64(size_t(mail.rows) * sizeof(Source));
    Window& window = *peers_[size_t(peer)].window;
    if (mail.rows > uint64_t(INT32_MAX) || mail.offset < map_.end || !window.contains(mail.offset, bytes)) {
      RankFailed failure;
      failure.rank = peer;
      failure.phase = kind_name(op.kind);
      failure.reason = "its grant lies outside its window";
      fail(failure);
    }
    uint8_t* base = window.at(mail.offset);
    target = {base,
              base + scales_at,
              reinterpret_cast<int64_t*>(base + idx_at),
              reinterpret_cast<float*>(base + weights_at),
              reinterpret_cast<Source*>(base + source_at),
              reinterpret_cast<const uint32_t*>(&mail + 1),
              mail.rows,
              !faults_.empty() && fault(kPush, op.seq, peer)};
    for (size_t s = 0; s < sources; ++s) total += routes.rows_to[size_t(peer) * sources + s];
  }
  const bool streaming = total * uint64_t(call.row_bytes) >= kStreamFrom;
  auto tell_progress = [&] {
    for (int peer = 0; peer < ranks; ++peer)
      if (alive(peer))
        flags_at(peer).progress.store((op.seq & 0xFFFFFFFF) << 32 | targets[size_t(peer)].written,
                                      std::memory_order_relaxed);
  };
  for (size_t s = 0; s < sources; ++s) {
    for (int64_t token = routes.begin[s]; token < routes.begin[s + 1]; ++token) {
      const size_t at = size_t(token * call.topk);
      const uint8_t* row = call.x + token * call.stride;
      for (int64_t k = 0; k < call.topk; ++k) {
        const int32_t peer = routes.rank[at + size_t(k)];
        if (peer < 0 || !alive(peer)) continue;
        Target& target = targets[size_t(peer)];
        const int32_t base = peer * int32_t(experts);
        const int32_t local = routes.expert[at + size_t(k)] - base;
        const uint64_t to = uint64_t(target.starts[call.expand ? s * experts + size_t(local) : s]) +
                            uint64_t(routes.order[at + size_t(k)]);
        if (to >= target.rows) continue;  // only a damaged grant leads here
        routes.row[at + size_t(k)] = int32_t(to);
        if (target.skip) continue;
        if (streaming)
          copy_streaming(target.x + to * uint64_t(call.row_bytes), row, size_t(call.row_bytes));
        else
          std::memcpy(target.x + to * uint64_t(call.row_bytes), row, size_t(call.row_bytes));
        if (call.scales != nullptr)
          std::memcpy(target.scales + to * uint64_t(call.scale_bytes), call.scales + token * call.scales_stride,
                      size_t(call.scale_bytes));
        if (call.expand) {
          target.idx[to] = local;
          if (weighted) {
            float sum = 0.0f;
            for (int64_t j = 0; j < call.topk; ++j)
              if (routes.expert[at + size_t(j)] == base + local) sum += call.weights[at + size_t(j)];
            target.weights[to] = sum;
          }
        } else {
          for (int64_t j = 0; j < call.topk; ++j) {
            const int32_t other = routes.expert[at + size_t(j)] - base;
            const bool here = other >= 0 && other < int32_t(experts);
            target.idx[to * uint64_t(columns) + uint64_t(j)] = here ? other : -1;
            if (weighted)
              target.weights[to * uint64_t(columns) + uint64_t(j)] = here ? call.weights[at + size_t(j)] : 0.0f;
          }
        }
        target.source[to] = {call.positions != nullptr ? call.positions[token] : int32_t(token - routes.begin[s]),
                             int32_t(k)};
        ++target.written;
      }
      if ((token & 63) == 63) tell_progress();
    }
  }
  tell_progress();
}

void Engine::send_done(Operation& op) {
  fence();
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer)) continue;
    if (!faults_.empty() && peer != config_.rank && fault(kPush, op.seq, peer)) continue;
    flags_at(peer).done.store(op.seq, std::memory_order_seq_cst);
    ring(peer);
  }
}

void Engine::receive(Operation& op, int64_t* waits) {
  if (!faults_.empty()) fault(kReceive, op.seq, -1);
  wait(kReceive, op, waits, [&](int peer) { return flags_from(peer).done.load(std::memory_order_seq_cst) >= op.seq; });
}

std::shared_ptr<Operation> Engine::dispatch(const DispatchCall& call) {
  std::unique_lock<Gate> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  enter();
  auto routes = std::make_shared<Routes>();
  Text bad;
  bool fine = true;
  if (call.cached) {
    *routes = *call.cached;
    routes->from.clear();
    std::fill(routes->row.begin(), routes->row.end(), -1);
  } else {
    routes->tokens = call.tokens;
    routes->topk = call.topk;
    routes->expand = call.expand;
    routes->begin = call.begin;
    fine = route(*routes, call.idx, call.num_experts, &bad);
    if (call.sent != nullptr)
      routes->to_all.assign(call.sent, call.sent + config_.sources * config_.all_ranks);
    else
      routes->to_all = routes->rows_to;
  }
  auto op = begin(Kind::dispatch);
  op->routes = routes;
  routes->id = op->seq;
  post(*op, call.arguments, fine ? routes.get() : nullptr, 0, 0, 0, fine ? nullptr : &bad, 0);
  auto all_posted = [&](int round) {
    wait(kPost, *op, nullptr, [&, round](int peer) {
      return post_from(peer, op->seq).seq.load(std::memory_order_seq_cst) >= op->seq * 4 + uint64_t(round);
    });
    check_posts(*op, round);
  };
  all_posted(0);
  bool granted = grant(*op, call, 0);
  std::vector<int> fewer = check_grants(*op, 0, nullptr);
  if (!fewer.empty()) {
    shorten(*op, fewer);
    post(*op, call.arguments, routes.get(), 0, 0, 0, nullptr, 1, &fewer);
  }
  if (!granted) {
    all_posted(1);
    grant(*op, call, 1);
  }
  if (!fewer.empty()) check_grants(*op, 1, &fewer);
  push(*op, call, call.idx);
  send_done(*op);
  Operation* raw = op.get();
  const int64_t row_bytes = call.row_bytes, scale_bytes = call.scale_bytes, columns = call.expand ? 1 : call.topk;
  const bool weighted = call.arguments[0] != 0;
  op->complete = [this, raw, row_bytes, scale_bytes, columns, weighted] {
    receive(*raw, nullptr);
    const auto* told = reinterpret_cast<const Source*>(raw->slot->data() + raw->source_at);
    auto& from = raw->routes->from;
    from.assign(told, told + raw->rows);
    if (!config_.mask) return;
    // A rank was lost after it had announced rows: they stay, blank and from nobody.
    uint8_t* slot = raw->slot->data();
    const auto& came_at = raw->routes->came_at;
    for (int peer = 0; peer < config_.ranks; ++peer) {
      if (!lost(*raw, peer)) continue;
      if (!dead(peer)) abandoned_.push_back(raw->slot);
      for (size_t block = size_t(peer); block < came_at.size(); block += size_t(config_.ranks)) {
        const auto [at, count] = came_at[block];
        std::memset(slot + at * row_bytes, 0, size_t(count * row_bytes));
        std::memset(slot + raw->scales_at + size_t(at * scale_bytes), 0, size_t(count * scale_bytes));
        std::fill_n(reinterpret_cast<int64_t*>(slot + raw->idx_at) + at * columns, count * columns, int64_t(-1));
        std::fill_n(from.begin() + at, count, Source{});
        if (weighted)
          std::fill_n(reinterpret_cast<float*>(slot + raw->weights_at) + at * columns, count * columns, 0.0f);
      }
    }
  };
  pending_.push_back(op);
  return op;
}

}  // namespace hal_ep
