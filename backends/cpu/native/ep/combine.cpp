// Normal combine, and what both combines share.
#include "detail.h"

namespace hal_ep {

const uint8_t* Engine::fetched_row(int peer, uint64_t seq, int64_t row, int64_t row_bytes) {
  return peers_[size_t(peer)].window->at(post_from(peer, seq).offset) + row * row_bytes;
}

void Engine::acknowledge(const Operation& op) {
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer)) continue;
    flags_at(peer).ack.store(op.seq, std::memory_order_seq_cst);
    ring(peer);
  }
}

// Wait until every rank has staged its rows, and see that they lie inside its window.
void Engine::fetch(Operation& op, int64_t* waits) {
  if (!faults_.empty()) fault(kFetch, op.seq, -1);
  wait(kFetch, op, waits, [&](int peer) {
    return post_from(peer, op.seq).seq.load(std::memory_order_seq_cst) >= op.seq * 4;
  });
  check_posts(op, 0);
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer)) continue;
    const Post& mail = post_from(peer, op.seq);
    if (mail.bytes == 0 || (mail.offset >= map_.end && peers_[size_t(peer)].window->contains(mail.offset, mail.bytes)))
      continue;
    RankFailed failure;
    failure.rank = peer;
    failure.phase = kind_name(op.kind);
    failure.reason = "its rows lie outside its window";
    fail(failure);
  }
}

std::shared_ptr<Operation> Engine::combine(const CombineCall& call) {
  std::unique_lock<Gate> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  auto op = begin(Kind::combine);
  op->routes = call.routes;
  if (!faults_.empty()) fault(kStage, op->seq, -1);
  const Routes& routes = *call.routes;
  const size_t bytes = size_t(routes.recv_rows * call.row_bytes);
  const size_t columns = routes.expand ? 1 : size_t(routes.topk);
  const size_t weight_bytes = call.row_weights != nullptr ? size_t(routes.recv_rows) * columns * 4 : 0;
  const uint8_t* begin_at = window_->at(map_.end);
  const bool in_place = call.x >= begin_at && call.x + bytes <= window_->at(0) + window_->size();
  std::shared_ptr<Lease> lease;
  uint64_t offset = in_place ? uint64_t(call.x - window_->at(0)) : 0, extra = 0;
  if (!in_place || weight_bytes != 0) {
    try {
      lease = arena_->take((in_place ? 0 : up64(bytes)) + weight_bytes);
    } catch (const SystemError& error) {
      Text text;
      set_text(text, "x", std::to_string(bytes) + " bytes to stage on rank " + number(config_.rank),
               "what fits in memory");
      post(*op, call.arguments, nullptr, 0, 0, 0, &text, 0);
      throw_text(text, config_.rank);
    }
    extra = lease->offset;
    if (!in_place) {
      offset = lease->offset;
      extra += up64(bytes);
      auto stage = [&](int64_t from, int64_t to) {
        const size_t at = size_t(from * call.row_bytes), size = size_t((to - from) * call.row_bytes);
        if (size == 0) return;
        if (bytes >= kStreamFrom)
          copy_streaming(lease->data() + at, call.x + at, size);
        else
          std::memcpy(lease->data() + at, call.x + at, size);
      };
      int64_t at = 0;
      if (call.now)
        for (const auto& [from, to] : routes.own) {
          stage(at, from);
          at = to;
        }
      stage(at, routes.recv_rows);
      fence();
    }
    if (weight_bytes != 0) std::memcpy(window_->at(extra), call.row_weights, weight_bytes);
  }
  post(*op, call.arguments, nullptr, offset, bytes, extra, nullptr, 0);
  stages_.push_back({op->seq, lease});
  Operation* raw = op.get();
  op->complete = [this, raw, call, columns, in_place] {
    fetch(*raw, nullptr);
    const Routes& way = *call.routes;
    const bool weighted = call.weights_out != nullptr;
    std::vector<const void*> rows(size_t(way.topk) + 1);
    std::vector<uint64_t> limit(static_cast<size_t>(config_.ranks));
    for (int peer = 0; peer < config_.ranks; ++peer)
      limit[size_t(peer)] = alive(peer) ? post_from(peer, raw->seq).bytes / uint64_t(call.row_bytes) : 0;
    for (int64_t token = 0; token < way.tokens; ++token) {
      const size_t at = size_t(token * way.topk);
      int count = 0;
      if (weighted) std::fill_n(call.weights_out + at, way.topk, 0.0f);
      for (int64_t k = 0; k < way.topk; ++k) {
        const int32_t peer = way.rank[at + size_t(k)], row = way.row[at + size_t(k)];
        if (peer < 0 || row < 0 || uint64_t(row) >= limit[size_t(peer)]) continue;
        const uint8_t* from = call.now && peer == config_.rank ? call.x + row * call.row_bytes
                                                               : fetched_row(peer, raw->seq, row, call.row_bytes);
        if (call.gather)
          std::memcpy(call.out + (token * way.topk + k) * call.row_bytes, from, size_t(call.row_bytes));
        else
          rows[size_t(count++)] = from;
        if (!weighted) continue;
        const Post& mail = post_from(peer, raw->seq);
        Window& window = *peers_[size_t(peer)].window;
        if (!window.contains(mail.extra, limit[size_t(peer)] * columns * 4)) continue;
        const float* sent = reinterpret_cast<const float*>(window.at(mail.extra)) + size_t(row) * columns;
        if (way.expand) {
          for (int64_t j = 0; j < way.topk; ++j)
            if (way.expert[at + size_t(j)] == way.expert[at + size_t(k)]) call.weights_out[at + size_t(j)] = sent[0];
        } else {
          for (int64_t j = 0; j < way.topk; ++j) call.weights_out[at + size_t(j)] += sent[j];
        }
      }
      if (call.gather) continue;
      reduce(call.out + token * call.out_stride, call.out_type, rows.data(), nullptr, count,
             call.bias0 ? call.bias0 + token * call.bias0_stride : nullptr,
             call.bias1 ? call.bias1 + token * call.bias1_stride : nullptr, call.type, size_t(call.columns));
    }
    acknowledge(*raw);
    // Rows that were not copied belong to the caller again once everybody has read them.
    if (in_place)
      wait(kAck, *raw, nullptr, [&](int peer) {
        return flags_from(peer).ack.load(std::memory_order_seq_cst) >= raw->seq;
      });
  };
  pending_.push_back(op);
  return op;
}

}  // namespace hal_ep
