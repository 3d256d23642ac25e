// Posts and grants: what ranks tell each other, and what they refuse together.
#include "detail.h"

namespace hal_ep {

// How many counts follow a post that is no refusal.
size_t Engine::post_words(Kind kind) const {
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
  if (kind == Kind::dispatch) return sources * (1 + experts + size_t(config_.all_ranks));
  if (kind != Kind::low_latency_dispatch) return 0;
  return granting() ? sources * (1 + experts) : size_t(config_.ranks) * experts;
}

void Engine::post(Operation& op, const uint64_t* arguments, const Routes* routes, uint64_t offset, uint64_t bytes,
                  uint64_t extra, const Text* refusal, int round, const std::vector<int>* only) {
  note(op, kPost, -1, false);
  if (!faults_.empty()) fault(kPost, op.seq, -1);
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
  const size_t count = routes != nullptr ? post_words(op.kind) : 0;
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer) || (only != nullptr && std::find(only->begin(), only->end(), peer) == only->end())) continue;
    Post& mail = post_at(peer, op.seq);
    uint64_t seq = op.seq * 4 + uint64_t(round);
    mail.kind = op.kind;
    mail.status = refusal != nullptr ? Status::refused : Status::ok;
    if (arguments != nullptr)
      std::memcpy(mail.arguments, arguments, sizeof mail.arguments);
    else
      std::memset(mail.arguments, 0, sizeof mail.arguments);
    mail.offset = offset;
    mail.bytes = bytes;
    mail.extra = extra;
    if (refusal != nullptr) mail.text = *refusal;
    auto* counts = reinterpret_cast<uint32_t*>(&mail + 1);
    if (routes != nullptr && op.kind == Kind::low_latency_dispatch && !granting()) {
      std::memcpy(counts, routes->experts_to.data(), 4 * count);
    } else if (routes != nullptr) {
      std::memcpy(counts, &routes->rows_to[size_t(peer) * sources], 4 * sources);
      std::memcpy(counts + sources, &routes->experts_to[size_t(peer) * sources * experts], 4 * sources * experts);
      const size_t rest = sources * (1 + experts);
      std::memcpy(counts + rest, routes->to_all.data(), 4 * (count - rest));
    }
    mail.check = checksum(mail, seq, counts, count);
    if (!faults_.empty() && peer != config_.rank) {
      bool corrupt = false;
      for (const Fault& one : faults_) corrupt = corrupt || one.what == Fault::corrupt;
      if (fault(kPost, op.seq, peer)) {
        if (!corrupt) continue;
        mail.check ^= 0xDEAD;
      }
    }
    mail.seq.store(seq, std::memory_order_seq_cst);
    ring(peer);
  }
}

// A refused operation is over for everyone, so its mail counts as read.
void Engine::give_up(const Operation& op) {
  while (!pending_.empty() && pending_.front()->seq < op.seq) settle(*pending_.front());
  acknowledge(op);
}

void Engine::check_posts(const Operation& op, int round) {
  int first = -1;
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer)) continue;
    const Post& mail = post_from(peer, op.seq);
    const size_t count = mail.status == Status::ok ? post_words(mail.kind) : 0;
    if (mail.check == checksum(mail, op.seq * 4 + uint64_t(round), post_rows(mail), count)) continue;
    RankFailed failure;
    failure.rank = peer;
    failure.phase = kind_name(op.kind);
    failure.reason = "its message is damaged";
    if (!config_.mask || peer == config_.rank) fail(failure);
    mask_now(peer);
  }
  for (int peer = 0; peer < config_.ranks; ++peer)
    if (alive(peer) && post_from(peer, op.seq).status == Status::refused) {
      give_up(op);
      throw_text(post_from(peer, op.seq).text, peer);
    }
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer)) continue;
    first = first < 0 ? peer : first;
    const Post &one = post_from(first, op.seq), &other = post_from(peer, op.seq);
    if (one.kind != other.kind) {
      Text text;
      set_text(text, "call", kind_name(other.kind) + std::string(" on rank ") + number(peer),
               kind_name(one.kind) + std::string(", as on rank ") + number(first));
      give_up(op);
      throw_text(text, peer);
    }
    for (uint32_t i = 0; i < kArguments; ++i)
      if (one.arguments[i] != other.arguments[i]) {
        Refused refused;
        refused.field = int(i);
        refused.rank = peer;
        refused.against = first;
        refused.value = other.arguments[i];
        refused.other = one.arguments[i];
        give_up(op);
        throw refused;
      }
    const uint32_t* rows = post_rows(other);
    for (size_t i = 0; i < post_words(op.kind); ++i)
      if (rows[i] > uint32_t(INT32_MAX)) {
        RankFailed failure;
        failure.rank = peer;
        failure.phase = kind_name(op.kind);
        failure.reason = "its message announces more rows than there can be";
        fail(failure);
      }
  }
}

void Engine::refuse(const Text& text) {
  std::unique_lock<Gate> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  auto op = begin(Kind::none);
  post(*op, nullptr, nullptr, 0, 0, 0, &text, 0);
  wait(kPost, *op, nullptr, [&](int peer) {
    return post_from(peer, op->seq).seq.load(std::memory_order_seq_cst) >= op->seq * 4;
  });
  check_posts(*op, 0);
  throw_text(text, config_.rank);
}

void Engine::give(const Operation& op, int round, Status status, uint64_t offset, uint64_t rows, uint64_t wanted,
                  const std::vector<uint32_t>& starts, size_t per_source) {
  if (!faults_.empty()) fault(kGrant, op.seq, -1);
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer)) continue;
    Grant& mail = grant_at(peer, op.seq);
    uint64_t seq = op.seq * 4 + uint64_t(round);
    mail.status = status;
    mail.offset = offset;
    mail.rows = rows;
    mail.wanted = wanted;
    mail.room = uint64_t(config_.room);
    auto* words = reinterpret_cast<uint32_t*>(&mail + 1);
    const size_t count = status == Status::ok || status == Status::shorten ? per_source : 0;
    if (count != 0) std::memcpy(words, &starts[size_t(peer) * per_source], 4 * per_source);
    mail.check = checksum(mail, seq, words, count);
    if (!faults_.empty() && peer != config_.rank && fault(kGrant, op.seq, peer)) continue;
    mail.seq.store(seq, std::memory_order_seq_cst);
    ring(peer);
  }
}

// As a source: wait for the grants and turn positions within blocks into rows. Returns who wants fewer rows.
std::vector<int> Engine::check_grants(Operation& op, int round, const std::vector<int>* only) {
  const uint64_t seq = op.seq * 4 + uint64_t(round);
  auto asked = [&](int peer) {
    return only == nullptr || std::find(only->begin(), only->end(), peer) != only->end();
  };
  wait(kGrant, op, nullptr, [&](int peer) {
    return !asked(peer) || grant_from(peer, op.seq).seq.load(std::memory_order_seq_cst) >= seq;
  });
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
  const bool by_expert = op.routes->expand || op.routes->packed;
  std::vector<int> fewer;
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer) || !asked(peer)) continue;
    const Grant& mail = grant_from(peer, op.seq);
    size_t count = mail.status == Status::ok ? (by_expert ? sources * experts : sources) : 0;
    if (mail.status == Status::shorten) count = sources;
    if (mail.check != checksum(mail, seq, reinterpret_cast<const uint32_t*>(&mail + 1), count)) {
      RankFailed failure;
      failure.rank = peer;
      failure.phase = kind_name(op.kind);
      failure.reason = "its grant is damaged";
      fail(failure);
    }
    if (mail.status == Status::shorten) fewer.push_back(peer);
    if (mail.status == Status::overflow && mail.rows != 0) {
      Text text;
      set_text(text, mail.rows == mail.wanted ? "x" : "expert_alignment",
               "what makes " + std::to_string(mail.rows) + " rows of " + std::to_string(mail.wanted) + " on rank " +
                   number(peer),
               "at most " + std::to_string(INT32_MAX) + " rows on a rank");
      throw_text(text, peer);
    }
    if (mail.status == Status::overflow) {
      Text text;
      uint64_t most = mail.offset != 0 ? mail.offset : mail.room;
      set_text(text, mail.offset != 0 ? "num_worst_tokens" : "max_recv_tokens",
               std::to_string(most) + ", while rank " + number(peer) + " would receive " +
                   std::to_string(mail.wanted) + " rows",
               "room for what is sent" + std::string(mail.offset != 0 ? "" : ", or overflow='drop' or 'grow'"));
      throw_text(text, peer);
    }
    if (mail.status == Status::refused) {
      Text text;
      set_text(text, "max_recv_tokens",
               std::to_string(mail.rows) + " rows, for which rank " + number(peer) + " lacks " +
                   std::to_string(mail.wanted) + " bytes of memory",
               "what fits in memory");
      throw_text(text, peer);
    }
  }
  return fewer;
}

}  // namespace hal_ep
