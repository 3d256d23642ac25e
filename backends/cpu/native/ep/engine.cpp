#include "engine.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <new>

namespace hal_ep {

const char* const kPhases[kPhaseCount] = {"post", "grant", "push", "receive", "stage", "fetch", "acknowledge"};

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kStreamFrom = size_t(2) << 20;  // writes of a call beyond which the caches are bypassed
constexpr auto kNap = std::chrono::milliseconds(20);

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::dispatch: return "dispatch";
    case Kind::combine: return "combine";
    case Kind::low_latency_dispatch: return "low_latency_dispatch";
    case Kind::low_latency_combine: return "low_latency_combine";
    default: return "call";
  }
}

size_t up64(size_t n) { return (n + 63) & ~size_t(63); }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

uint64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  return uint64_t(time.tv_sec) * 1000000000u + uint64_t(time.tv_nsec);
}

uint64_t mix(uint64_t sum, uint64_t value) {
  sum ^= value;
  sum *= 0x9E3779B97F4A7C15u;
  return sum ^ (sum >> 29);
}

uint64_t mix_words(uint64_t sum, const uint32_t* words, size_t count) {
  for (size_t i = 0; i + 1 < count; i += 2) sum = mix(sum, words[i] | uint64_t(words[i + 1]) << 32);
  return count % 2 ? mix(sum, words[count - 1]) : sum;
}

uint64_t checksum(const Post& post, uint64_t seq, const uint32_t* words, size_t count) {
  uint64_t sum = mix(seq, uint64_t(post.kind) | uint64_t(post.status) << 32);
  for (uint64_t value : post.arguments) sum = mix(sum, value);
  sum = mix(mix(mix(sum, post.offset), post.bytes), post.extra);
  return mix_words(sum, words, count);
}

uint64_t checksum(const Grant& grant, uint64_t seq, const uint32_t* words, size_t count) {
  uint64_t sum = mix(mix(mix(seq, uint64_t(grant.status)), grant.offset), grant.rows);
  return mix_words(mix(mix(sum, grant.wanted), grant.room), words, count);
}

// Text of a peer: never trusted to end.
std::string text_of(const char* at, size_t size) { return std::string(at, strnlen(at, size)); }

void set_text(Text& text, const char* argument, const std::string& got, const std::string& legal) {
  std::snprintf(text.argument, sizeof text.argument, "%s", argument);
  std::snprintf(text.got, sizeof text.got, "%s", got.c_str());
  std::snprintf(text.legal, sizeof text.legal, "%s", legal.c_str());
}

[[noreturn]] void throw_text(const Text& text, int rank) {
  Refused refused;
  refused.argument = text_of(text.argument, sizeof text.argument);
  refused.got = text_of(text.got, sizeof text.got);
  refused.legal = text_of(text.legal, sizeof text.legal);
  refused.rank = rank;
  throw refused;
}

}  // namespace

Engine::Engine(const Config& config, const uint8_t token[32])
    : config_(config), map_(uint32_t(config.ranks), uint32_t(config.sources), uint32_t(config.experts)) {
  window_ = Window::create(map_, uint32_t(config.rank), token);
  arena_ = std::make_shared<Arena>(window_, map_.end);
  peers_.resize(size_t(config.ranks));
  peers_[size_t(config.rank)].window = window_;
}

Engine::~Engine() { close(); }

void Engine::attach(int peer, int fd, int pidfd) {
  const auto* header = reinterpret_cast<const Header*>(window_->at(0));
  peers_[size_t(peer)].window = Window::attach(fd, map_, uint32_t(peer), header->token);
  peers_[size_t(peer)].pidfd = pidfd < 0 ? -1 : dup(pidfd);
}

void Engine::attach_direct(int peer, std::shared_ptr<Window> window) { peers_[size_t(peer)].window = window; }

Flags& Engine::flags_from(int peer) const {
  return reinterpret_cast<Flags*>(window_->at(map_.flags))[peer];
}
Flags& Engine::flags_at(int peer) const {
  return reinterpret_cast<Flags*>(peers_[size_t(peer)].window->at(map_.flags))[config_.rank];
}
Post& Engine::post_from(int peer, uint64_t seq) const {
  return *reinterpret_cast<Post*>(window_->at(map_.posts + map_.post_bytes * (size_t(peer) * kRing + seq % kRing)));
}
Post& Engine::post_at(int peer, uint64_t seq) const {
  size_t box = size_t(config_.rank) * kRing + seq % kRing;
  return *reinterpret_cast<Post*>(peers_[size_t(peer)].window->at(map_.posts + map_.post_bytes * box));
}
Grant& Engine::grant_from(int peer, uint64_t seq) const {
  return *reinterpret_cast<Grant*>(
      window_->at(map_.grants + map_.grant_bytes * (size_t(peer) * kRing + seq % kRing)));
}
Grant& Engine::grant_at(int peer, uint64_t seq) const {
  size_t box = size_t(config_.rank) * kRing + seq % kRing;
  return *reinterpret_cast<Grant*>(peers_[size_t(peer)].window->at(map_.grants + map_.grant_bytes * box));
}

// Flags are stored before and loaded after the count of sleepers, all sequentially consistent: either the sleeper
// sees the flag, or this rank sees the sleeper.
void Engine::ring(int peer) {
  if (peer == config_.rank) return;
  auto* header = reinterpret_cast<Header*>(peers_[size_t(peer)].window->at(0));
  if (header->sleepers.load(std::memory_order_seq_cst) == 0) return;
  header->bell.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, &header->bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool Engine::dead(int peer) const {
  if (peers_[size_t(peer)].pidfd < 0) return false;
  pollfd entry{peers_[size_t(peer)].pidfd, POLLIN, 0};
  return poll(&entry, 1, 0) == 1 && (entry.revents & POLLIN);
}

void Engine::mask_now(int peer) {
  peers_[size_t(peer)].masked = true;
  flags_at(peer).state.fetch_or(kMaskedYou, std::memory_order_seq_cst);
  ring(peer);
}

void Engine::set_mask(int rank, bool masked) {
  std::unique_lock<std::mutex> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  if (masked) {
    mask_now(rank);
  } else {
    peers_[size_t(rank)].masked = false;
    flags_at(rank).state.fetch_and(~uint32_t(kMaskedYou), std::memory_order_seq_cst);
  }
}

std::vector<bool> Engine::masked() const {
  std::vector<bool> result;
  for (const Peer& peer : peers_) result.push_back(peer.masked);
  return result;
}

void Engine::fail(RankFailed failure) {
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peer == config_.rank || !peers_[size_t(peer)].window) continue;
    Flags& flags = flags_at(peer);
    flags.failed_rank = failure.rank;
    flags.failed_expert = failure.expert;
    flags.failed_expected = failure.expected;
    flags.failed_received = failure.received;
    std::snprintf(flags.failed_phase, sizeof flags.failed_phase, "%s", failure.phase.c_str());
    std::snprintf(flags.failed_reason, sizeof flags.failed_reason, "%s", failure.reason.c_str());
    flags.state.fetch_or(kFailed, std::memory_order_seq_cst);
    ring(peer);
  }
  broken_ = std::make_unique<RankFailed>(failure);
  throw failure;
}

// What another rank found out counts here too: all ranks name the same culprit.
void Engine::check_abort(int peer) {
  Flags& flags = flags_from(peer);
  if (!(flags.state.load(std::memory_order_acquire) & kFailed)) return;
  RankFailed failure;
  failure.rank = flags.failed_rank;
  failure.expert = flags.failed_expert;
  failure.expected = flags.failed_expected;
  failure.received = flags.failed_received;
  failure.phase = text_of(flags.failed_phase, sizeof flags.failed_phase);
  failure.reason = text_of(flags.failed_reason, sizeof flags.failed_reason);
  if (failure.rank != config_.rank) failure.reason += ", as rank " + number(peer) + " found";
  broken_ = std::make_unique<RankFailed>(failure);
  throw failure;
}

template <class Ready>
void Engine::wait(Phase phase, const Operation& op, int64_t* waits, Ready ready) {
  left_.clear();
  for (int peer = 0; peer < config_.ranks; ++peer)
    if (alive(peer) && !ready(peer)) left_.push_back(peer);
  if (left_.empty()) return;
  note(op, phase, left_[0], false);
  const auto start = Clock::now();
  auto sweep = [&] {
    auto gone = [&](int peer) {
      if (!ready(peer)) return false;
      if (waits != nullptr)
        waits[peer] += std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count();
      return true;
    };
    left_.erase(std::remove_if(left_.begin(), left_.end(), gone), left_.end());
  };
  const int spins = config_.crowded ? 30 : 300, yields = config_.crowded ? 20 : 100;
  for (int turn = 0; turn < spins && !left_.empty(); ++turn) {
    relax();
    sweep();
  }
  for (int turn = 0; turn < yields && !left_.empty(); ++turn) {
    sched_yield();
    sweep();
  }
  auto* header = reinterpret_cast<Header*>(window_->at(0));
  const auto deadline = start + std::chrono::duration<double>(config_.timeout);
  auto next_look = start;
  while (!left_.empty()) {
    header->sleepers.fetch_add(1, std::memory_order_seq_cst);
    uint32_t heard = header->bell.load(std::memory_order_seq_cst);
    sweep();
    if (!left_.empty()) {
      timespec nap{0, std::chrono::nanoseconds(kNap).count()};
      syscall(SYS_futex, &header->bell, FUTEX_WAIT, heard, &nap, nullptr, 0);
    }
    header->sleepers.fetch_sub(1, std::memory_order_seq_cst);
    sweep();
    auto now = Clock::now();
    if (left_.empty() || now < next_look) continue;
    next_look = now + kNap;
    note(op, phase, left_[0], false);
    if (closing_.load()) throw Interrupted();
    for (int peer = 0; peer < config_.ranks; ++peer)
      if (peer != config_.rank && alive(peer)) {
        check_abort(peer);
        if (flags_from(peer).state.load(std::memory_order_acquire) & kMaskedYou) {
          RankFailed failure;
          failure.rank = config_.rank;
          failure.phase = kind_name(op.kind);
          failure.reason = "rank " + number(peer) + " carries on without this one";
          broken_ = std::make_unique<RankFailed>(failure);
          throw failure;
        }
      }
    if (poll_signals) {
      try {
        poll_signals();
      } catch (const Interrupted&) {
        RankFailed failure;
        failure.rank = config_.rank;
        failure.phase = kind_name(op.kind);
        failure.reason = "interrupted by a signal";
        try {
          fail(failure);
        } catch (const RankFailed&) {
        }
        throw;
      }
    }
    std::vector<int> lost;
    std::string reason;
    for (int peer : left_) {
      bool is_dead = dead(peer), is_closed = flags_from(peer).state.load(std::memory_order_acquire) & kClosed;
      // Whatever it did before it ended is there by now.
      if ((is_dead || is_closed) && !ready(peer)) {
        lost.push_back(peer);
        if (reason.empty()) reason = is_dead ? "its process ended" : "it closed its buffer";
      }
    }
    if (lost.empty() && now >= deadline) {
      lost = left_;
      char text[80];
      std::snprintf(text, sizeof text, "no answer within %g s", config_.timeout);
      reason = text;
      if (lost.size() > 1) {
        reason += "; nor from rank";
        for (size_t i = 1; i < lost.size(); ++i) reason += (i > 1 ? ", " : " ") + number(lost[i]);
      }
    }
    if (lost.empty()) continue;
    if (config_.mask) {
      for (int peer : lost) {
        mask_now(peer);
        left_.erase(std::remove(left_.begin(), left_.end(), peer), left_.end());
      }
      continue;
    }
    RankFailed failure;
    failure.rank = lost[0];
    failure.phase = std::string(kind_name(op.kind)) + " (" + kPhases[phase] + ")";
    failure.reason = reason;
    if (phase == kReceive && size_t(lost[0]) < op.expected.size()) {
      uint64_t progress = flags_from(lost[0]).progress.load(std::memory_order_acquire);
      failure.expected = op.expected[size_t(lost[0])];
      failure.received = std::min(int64_t(progress >> 32 == (op.seq & 0xFFFFFFFF) ? progress & 0xFFFFFFFF : 0),
                                  failure.expected);
      failure.expert = op.first_expert[size_t(lost[0])];
    }
    fail(failure);
  }
}

void Engine::note(const Operation& op, Phase phase, int waits_for, bool end) {
  auto& record = reinterpret_cast<Record*>(window_->at(map_.records))[op.seq % kRecords];
  if (record.seq != op.seq) {
    record.end_ns = 0;
    record.kind = op.kind;
    record.begin_ns = now_ns();
    record.tokens = op.routes ? uint32_t(op.routes->tokens) : 0;
    record.seq = op.seq;
  }
  record.phase = phase;
  record.waits_for = waits_for;
  if (end) record.end_ns = now_ns();
}

std::vector<Record> Engine::records(int rank) {
  std::vector<Record> found;
  if (!peers_[size_t(rank)].window) return found;
  const auto* ring = reinterpret_cast<const Record*>(peers_[size_t(rank)].window->at(map_.records));
  for (uint32_t i = 0; i < kRecords; ++i)
    if (ring[i].seq != 0 && ring[i].phase < kPhaseCount) found.push_back(ring[i]);
  std::sort(found.begin(), found.end(), [](const Record& a, const Record& b) { return a.seq < b.seq; });
  return found;
}

bool Engine::fault(Phase phase, uint64_t seq, int target) {
  bool drop = false;
  for (const Fault& one : faults_) {
    if (one.phase != int(phase) || (one.seq >= 0 && uint64_t(one.seq) != seq)) continue;
    if (target >= 0 && one.target >= 0 && one.target != target) continue;
    if (one.what == Fault::drop || one.what == Fault::corrupt) {
      drop = drop || target >= 0;
    } else if (target < 0) {
      if (one.what == Fault::delay) {
        timespec time{time_t(one.seconds), long((one.seconds - double(time_t(one.seconds))) * 1e9)};
        nanosleep(&time, nullptr);
      }
      if (one.what == Fault::kill) raise(SIGKILL);
      if (one.what == Fault::stop) raise(SIGSTOP);
    }
  }
  return drop;
}

void Engine::enter() {
  if (closed_) {
    RankFailed failure;
    failure.rank = config_.rank;
    failure.phase = "call";
    failure.reason = "this buffer is closed";
    throw failure;
  }
  if (broken_) throw *broken_;
  while (pending_.size() >= kRing - 4) settle(*pending_.front());
}

std::shared_ptr<Operation> Engine::begin(Kind kind, int64_t) {
  enter();
  auto op = std::make_shared<Operation>();
  op->seq = ++seq_;
  op->kind = kind;
  op->expected.assign(size_t(config_.ranks), 0);
  op->first_expert.assign(size_t(config_.ranks), -1);
  release_stages();
  // The boxes of this operation are free once everybody has read the combine that used them last.
  while (!stages_.empty() && stages_.front().seq + kRing <= op->seq) {
    uint64_t seq = stages_.front().seq;
    wait(kAck, *op, nullptr,
         [&](int peer) { return flags_from(peer).ack.load(std::memory_order_seq_cst) >= seq; });
    release_stages();
  }
  return op;
}

void Engine::release_stages() {
  while (!stages_.empty()) {
    for (int peer = 0; peer < config_.ranks; ++peer)
      if (alive(peer) && flags_from(peer).ack.load(std::memory_order_acquire) < stages_.front().seq) return;
    stages_.pop_front();
  }
}

void Engine::post(Operation& op, const uint64_t* arguments, const Routes* routes, uint64_t offset, uint64_t bytes,
                  uint64_t extra, const Text* refusal, int round, const std::vector<int>* only) {
  note(op, kPost, -1, false);
  if (!faults_.empty()) fault(kPost, op.seq, -1);
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts), words = sources * (1 + experts);
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
    size_t count = 0;
    if (routes != nullptr) {
      count = words;
      std::memcpy(counts, &routes->rows_to[size_t(peer) * sources], 4 * sources);
      std::memcpy(counts + sources, &routes->experts_to[size_t(peer) * sources * experts], 4 * sources * experts);
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
  const size_t words = size_t(config_.sources) * (1 + size_t(config_.experts));
  const bool counted = op.kind == Kind::dispatch || op.kind == Kind::low_latency_dispatch;
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (!alive(peer)) continue;
    const Post& mail = post_from(peer, op.seq);
    const bool theirs = mail.kind == Kind::dispatch || mail.kind == Kind::low_latency_dispatch;
    const size_t count = mail.status == Status::ok && theirs ? words : 0;
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
    if (counted) {
      const uint32_t* rows = post_rows(other);
      for (size_t i = 0; i < words; ++i)
        if (rows[i] > uint32_t(INT32_MAX)) {
          RankFailed failure;
          failure.rank = peer;
          failure.phase = kind_name(op.kind);
          failure.reason = "its message announces more rows than there can be";
          fail(failure);
        }
    }
  }
}

void Engine::refuse(const Text& text) {
  std::unique_lock<std::mutex> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  auto op = begin(Kind::none, 0);
  post(*op, nullptr, nullptr, 0, 0, 0, &text, 0);
  wait(kPost, *op, nullptr, [&](int peer) {
    return post_from(peer, op->seq).seq.load(std::memory_order_seq_cst) >= op->seq * 4;
  });
  check_posts(*op, 0);
  throw_text(text, config_.rank);
}

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
        const int32_t slot = int32_t(expert), rank = int32_t(expert / local);
        routes.expert[at + size_t(k)] = slot;
        int64_t same_expert = -1, same_rank = -1;
        for (int64_t j = 0; j < k; ++j) {
          const int32_t before = routes.expert[at + size_t(j)];
          if (before == slot && same_expert < 0) same_expert = j;
          if (before >= 0 && before / local == rank) same_rank = j;
        }
        const size_t block = size_t(rank) * sources + source;
        uint32_t& per_expert = routes.experts_to[block * size_t(local) + size_t(expert % local)];
        uint32_t& per_rank = routes.rows_to[block];
        if (by_expert) {
          if (same_expert < 0) {
            routes.rank[at + size_t(k)] = rank;
            routes.order[at + size_t(k)] = int32_t(per_expert);
          } else if (routes.packed) {
            routes.rank[at + size_t(k)] = rank;
            routes.order[at + size_t(k)] = routes.order[at + size_t(same_expert)];
          }
        } else if (same_rank < 0) {
          routes.rank[at + size_t(k)] = rank;
          routes.order[at + size_t(k)] = int32_t(per_rank);
        }
        per_expert += same_expert < 0;
        per_rank += same_rank < 0;
      }
    }
  }
  return true;
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
    give(op, round, Status::overflow, uint64_t(worst && rows > call.worst ? call.worst : 0), 0, uint64_t(total), starts,
         0);
    return true;
  }
  if (worst) rows = call.worst;
  const int64_t columns = call.expand ? 1 : call.topk;
  op.rows = rows;
  op.x_at = 0;
  op.scales_at = up64(size_t(rows * call.row_bytes));
  op.idx_at = op.scales_at + up64(size_t(rows * call.scale_bytes));
  op.weights_at = op.idx_at + up64(size_t(rows * columns) * 8);
  const size_t bytes = op.weights_at + (call.arguments[0] ? up64(size_t(rows * columns) * 4) : 0);
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
  auto blank = [&](int64_t from, int64_t to) {
    std::memset(slot + from * call.row_bytes, 0, size_t((to - from) * call.row_bytes));
    std::memset(slot + op.scales_at + size_t(from * call.scale_bytes), 0, size_t((to - from) * call.scale_bytes));
    std::fill(idx + from * columns, idx + to * columns, int64_t(-1));
    if (call.arguments[0]) std::fill(weights + from * columns, weights + to * columns, 0.0f);
  };
  const size_t per_source = call.expand ? sources * experts : sources;
  starts.assign(size_t(ranks) * per_source, 0);
  if (call.expand) {
    for (size_t e = 0; e < experts; ++e) {
      int64_t at = group[e];
      for (size_t s = 0; s < sources; ++s)
        for (int peer = 0; peer < ranks; ++peer) {
          if (!alive(peer)) continue;
          starts[size_t(peer) * per_source + s * experts + e] = uint32_t(at);
          at += post_rows(post_from(peer, op.seq))[sources + s * experts + e];
        }
      blank(at, group[e] + routes.recv_experts[e]);
    }
  } else {
    int64_t at = 0;
    for (size_t s = 0; s < sources; ++s)
      for (int peer = 0; peer < ranks; ++peer) {
        if (!alive(peer)) continue;
        starts[size_t(peer) * sources + s] = uint32_t(at);
        at += post_rows(post_from(peer, op.seq))[s];
      }
    if (worst) {
      std::fill(idx + at * columns, idx + rows * columns, int64_t(-1));
      if (call.arguments[0]) std::fill(weights + at * columns, weights + rows * columns, 0.0f);
    }
  }
  give(op, round, Status::ok, op.slot->offset, uint64_t(rows), 0, starts, per_source);
  return true;
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
    const uint32_t* starts;
    uint64_t rows;
    bool skip;
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
    const size_t bytes = weights_at + (weighted ? up64(size_t(mail.rows) * size_t(columns) * 4) : 0);
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
              reinterpret_cast<const uint32_t*>(&mail + 1),
              mail.rows,
              !faults_.empty() && fault(kPush, op.seq, peer)};
    for (size_t s = 0; s < sources; ++s) total += routes.rows_to[size_t(peer) * sources + s];
  }
  const bool streaming = total * uint64_t(call.row_bytes) >= kStreamFrom;
  uint32_t written = 0;
  for (size_t s = 0; s < sources; ++s) {
    for (int64_t token = routes.begin[s]; token < routes.begin[s + 1]; ++token) {
      const size_t at = size_t(token * call.topk);
      const uint8_t* row = call.x + token * call.stride;
      for (int64_t k = 0; k < call.topk; ++k) {
        const int32_t peer = routes.rank[at + size_t(k)];
        if (peer < 0 || !alive(peer)) continue;
        const Target& target = targets[size_t(peer)];
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
        ++written;
      }
      if ((token & 63) == 63)
        for (int peer = 0; peer < ranks; ++peer)
          if (alive(peer))
            flags_at(peer).progress.store((op.seq & 0xFFFFFFFF) << 32 | written, std::memory_order_relaxed);
    }
  }
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

void Engine::settle(Operation& op) {
  auto keep = pending_.front();
  pending_.pop_front();
  try {
    op.complete();
  } catch (...) {
    op.error = std::current_exception();
  }
  op.finished = true;
  op.complete = nullptr;
  op.use.reset();
  note(op, kReceive, -1, true);
}

void Engine::finish(const std::shared_ptr<Operation>& op) {
  std::unique_lock<std::mutex> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  while (!op->finished) {
    if (pending_.empty()) {
      enter();
      return;
    }
    settle(*pending_.front());
  }
  if (op->error) std::rethrow_exception(op->error);
}

std::shared_ptr<Operation> Engine::dispatch(const DispatchCall& call) {
  std::unique_lock<std::mutex> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  enter();
  auto routes = std::make_shared<Routes>();
  Text bad;
  bool fine = true;
  if (call.cached) {
    *routes = *call.cached;
    std::fill(routes->row.begin(), routes->row.end(), -1);
  } else {
    routes->tokens = call.tokens;
    routes->topk = call.topk;
    routes->expand = call.expand;
    routes->begin = call.begin;
    fine = route(*routes, call.idx, call.num_experts, &bad);
  }
  auto op = begin(Kind::dispatch, call.tokens);
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
  const int64_t row_bytes = call.row_bytes, columns = call.expand ? 1 : call.topk;
  const bool weighted = call.arguments[0] != 0, by_expert = call.expand;
  op->complete = [this, raw, row_bytes, columns, weighted, by_expert] {
    std::vector<bool> before = masked();
    receive(*raw, nullptr);
    if (!config_.mask || masked() == before) return;
    // A rank was lost after it had announced rows: they stay, blank and without an expert.
    auto* idx = reinterpret_cast<int64_t*>(raw->slot->data() + raw->idx_at);
    auto* weights = reinterpret_cast<float*>(raw->slot->data() + raw->weights_at);
    for (int peer = 0; peer < config_.ranks; ++peer) {
      if (alive(peer) || before[size_t(peer)]) continue;
      const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
      const uint32_t* rows = post_rows(post_from(peer, raw->seq));
      const auto* starts = reinterpret_cast<const uint32_t*>(&grant_at(peer, raw->seq) + 1);
      const size_t blocks = by_expert ? sources * experts : sources;
      for (size_t b = 0; b < blocks; ++b) {
        const uint32_t count = by_expert ? rows[sources + b] : rows[b];
        std::memset(raw->slot->data() + int64_t(starts[b]) * row_bytes, 0, size_t(int64_t(count) * row_bytes));
        std::fill_n(idx + int64_t(starts[b]) * columns, int64_t(count) * columns, int64_t(-1));
        if (weighted) std::fill_n(weights + int64_t(starts[b]) * columns, int64_t(count) * columns, 0.0f);
      }
    }
  };
  pending_.push_back(op);
  return op;
}

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
  std::unique_lock<std::mutex> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  auto op = begin(Kind::combine, call.routes->tokens);
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
      if (bytes >= kStreamFrom) {
        copy_streaming(lease->data(), call.x, bytes);
        fence();
      } else if (bytes != 0) {
        std::memcpy(lease->data(), call.x, bytes);
      }
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
        const uint8_t* from = fetched_row(peer, raw->seq, row, call.row_bytes);
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

void Engine::release(const std::shared_ptr<Routes>& routes) {
  std::unique_lock<std::mutex> hold(api_);
  if (routes->packed_slot >= 0 && packed_[routes->packed_slot].id == routes->id)
    packed_[routes->packed_slot].released = true;
}

std::shared_ptr<Operation> Engine::packed_dispatch(const PackedCall& call) {
  std::unique_lock<std::mutex> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  enter();
  auto routes = std::make_shared<Routes>();
  routes->tokens = call.tokens;
  routes->topk = call.topk;
  routes->packed = true;
  routes->begin.assign(size_t(config_.sources) + 1, call.tokens);
  routes->begin[0] = 0;
  Text bad;
  bool fine = route(*routes, call.idx, call.num_experts, &bad);
  const int64_t groups = (call.columns + 127) / 128;
  const int64_t row_bytes = call.cast != 0 ? call.columns : call.columns * int64_t(type_bytes(call.type));
  const int64_t scale_words = call.cast == 0 ? 0 : call.cast == 3 ? (groups + 3) / 4 : groups;
  const size_t cells = size_t(config_.experts * call.slots);
  auto op = begin(Kind::low_latency_dispatch, call.tokens);
  op->routes = routes;
  op->scales_at = up64(cells * size_t(row_bytes));
  op->idx_at = op->scales_at + up64(cells * size_t(scale_words) * 4);
  const size_t bytes = op->idx_at + up64(cells * 4);
  int chosen = -1;
  for (int i = 0; i < 2; ++i)
    if (chosen < 0 && (packed_[i].released || packed_[i].use.expired())) chosen = i;
  if (fine && chosen < 0) {
    fine = false;
    set_text(bad, "low_latency_dispatch",
             "a third result while two are live on rank " + number(config_.rank),
             "at most two: combine one, or let go of it, first");
  }
  if (fine && (!packed_[chosen].lease || packed_[chosen].lease->bytes < bytes)) {
    packed_[chosen].lease.reset();
    try {
      packed_[chosen].lease = arena_->take(bytes, false);
    } catch (const SystemError& error) {
      fine = false;
      set_text(bad, "max_tokens_per_rank", std::to_string(bytes) + " bytes of packed rows", "what fits in memory");
    }
  }
  if (fine) {
    op->slot = packed_[chosen].lease;
    op->use = std::make_shared<int>(chosen);
    packed_[chosen].use = op->use;
    packed_[chosen].released = false;
    packed_[chosen].id = op->seq;
    routes->packed_slot = chosen;
    routes->id = op->seq;
  }
  post(*op, call.arguments, fine ? routes.get() : nullptr, 0, 0, 0, fine ? nullptr : &bad, 0);
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
  const PackedCall kept = call;
  op->complete = [this, raw, kept, row_bytes, scale_words] {
    if (raw->error) std::rethrow_exception(raw->error);
    std::vector<bool> before = masked();
    receive(*raw, kept.waits);
    if (config_.mask && masked() != before)
      for (int peer = 0; peer < config_.ranks; ++peer) {
        if (alive(peer) || before[size_t(peer)]) continue;
        for (int e = 0; e < config_.experts; ++e) {
          int64_t range = kept.ranges[e * config_.ranks + peer];
          int64_t first = range >> 32, count = range & 0xFFFFFFFF;
          std::memset(raw->slot->data() + (e * kept.slots + first) * row_bytes, 0, size_t(count * row_bytes));
          auto* info = reinterpret_cast<int32_t*>(raw->slot->data() + raw->idx_at);
          std::fill_n(info + e * kept.slots + first, count, -1);
        }
      }
    if (kept.stats != nullptr)
      for (int e = 0; e < config_.experts; ++e) kept.stats[e] += kept.count[e];
  };
  pending_.push_back(op);
  return op;
}

void Engine::packed_body(Operation& op, const PackedCall& call) {
  wait(kPost, op, nullptr, [&](int peer) {
    return post_from(peer, op.seq).seq.load(std::memory_order_seq_cst) >= op.seq * 4;
  });
  check_posts(op, 0);
  const int ranks = config_.ranks;
  const size_t sources = size_t(config_.sources), experts = size_t(config_.experts);
  const size_t per_source = sources * experts;
  std::vector<uint32_t> starts(size_t(ranks) * per_source, 0);
  for (size_t e = 0; e < experts; ++e) {
    uint64_t at = 0;
    for (size_t s = 0; s < sources; ++s)
      for (int peer = 0; peer < ranks; ++peer) {
        uint32_t count = alive(peer) ? post_rows(post_from(peer, op.seq))[sources + s * experts + e] : 0;
        call.ranges[(e * sources + s) * size_t(ranks) + size_t(peer)] = int64_t(at << 32 | count);
        starts[size_t(peer) * per_source + s * experts + e] = uint32_t(at);
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
  give(op, 0, Status::ok, op.slot->offset, uint64_t(call.slots), 0, starts, per_source);
  check_grants(op, 0, nullptr);
  note(op, kPush, -1, false);
  if (!faults_.empty()) fault(kPush, op.seq, -1);
  Routes& routes = *op.routes;
  const int64_t groups = (call.columns + 127) / 128;
  const int64_t row_bytes = call.cast != 0 ? call.columns : call.columns * int64_t(type_bytes(call.type));
  const int64_t scale_words = call.cast == 0 ? 0 : call.cast == 3 ? (groups + 3) / 4 : groups;
  std::vector<uint8_t> scratch(call.cast != 0 ? size_t(row_bytes) : 0);
  std::vector<uint32_t> scales(size_t(scale_words) + 1, 0);
  std::vector<bool> skip(static_cast<size_t>(ranks), false);
  uint64_t total = 0;
  for (int peer = 0; peer < ranks; ++peer) {
    if (!alive(peer)) continue;
    const Grant& mail = grant_from(peer, op.seq);
    const size_t bytes = op.idx_at + up64(experts * size_t(call.slots) * 4);
    if (mail.rows != uint64_t(call.slots) || mail.offset < map_.end ||
        !peers_[size_t(peer)].window->contains(mail.offset, bytes)) {
      RankFailed failure;
      failure.rank = peer;
      failure.phase = kind_name(op.kind);
      failure.reason = "its grant lies outside its window";
      fail(failure);
    }
    skip[size_t(peer)] = !faults_.empty() && peer != config_.rank && fault(kPush, op.seq, peer);
    for (size_t b = 0; b < per_source; ++b) total += routes.experts_to[size_t(peer) * per_source + b];
  }
  const bool streaming = total * uint64_t(row_bytes) >= kStreamFrom;
  uint32_t written = 0;
  for (int64_t token = 0; token < call.tokens; ++token) {
    const uint8_t* row = call.x + token * call.stride;
    const size_t at = size_t(token * call.topk);
    bool cast_done = false;
    for (int64_t k = 0; k < call.topk; ++k) {
      const int32_t peer = routes.rank[at + size_t(k)];
      if (peer < 0 || !alive(peer)) continue;
      const int32_t slot = routes.expert[at + size_t(k)];
      const size_t local = size_t(slot - peer * int32_t(experts));
      const Grant& mail = grant_from(peer, op.seq);
      const uint64_t in_expert =
          uint64_t(reinterpret_cast<const uint32_t*>(&mail + 1)[local]) + uint64_t(routes.order[at + size_t(k)]);
      if (in_expert >= uint64_t(call.slots)) continue;  // only a damaged grant leads here
      const uint64_t to = local * uint64_t(call.slots) + in_expert;
      routes.row[at + size_t(k)] = int32_t(to);
      bool again = false;
      for (int64_t j = 0; j < k; ++j) again = again || routes.expert[at + size_t(j)] == slot;
      if (again || skip[size_t(peer)]) continue;
      if (call.cast != 0 && !cast_done) {
        cast_fp8(scratch.data(), scales.data(), row, call.type, size_t(call.columns), call.cast >= 2, call.cast == 3);
        row = scratch.data();
        cast_done = true;
      }
      uint8_t* base = peers_[size_t(peer)].window->at(mail.offset);
      if (streaming)
        copy_streaming(base + to * uint64_t(row_bytes), row, size_t(row_bytes));
      else
        std::memcpy(base + to * uint64_t(row_bytes), row, size_t(row_bytes));
      auto* out = reinterpret_cast<uint32_t*>(base + op.scales_at) + local * uint64_t(scale_words * call.slots);
      for (int64_t g = 0; g < scale_words; ++g) out[uint64_t(g * call.slots) + in_expert] = scales[size_t(g)];
      reinterpret_cast<int32_t*>(base + op.idx_at)[to] = int32_t(token);
      ++written;
    }
    if ((token & 63) == 63)
      for (int peer = 0; peer < ranks; ++peer)
        if (alive(peer))
          flags_at(peer).progress.store((op.seq & 0xFFFFFFFF) << 32 | written, std::memory_order_relaxed);
  }
  send_done(op);
}

std::shared_ptr<Operation> Engine::packed_combine(const PackedCombineCall& call) {
  std::unique_lock<std::mutex> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  enter();
  const Routes& routes = *call.routes;
  auto op = begin(Kind::low_latency_combine, routes.tokens);
  op->routes = call.routes;
  if (!faults_.empty()) fault(kStage, op->seq, -1);
  Text bad;
  bool fine = true;
  for (size_t i = 0; fine && i < size_t(routes.tokens * routes.topk); ++i) {
    const int64_t expert = call.idx[i] < 0 ? -1 : call.idx[i] - config_.expert_base;
    if (expert == routes.expert[i] || call.idx[i] < 0) continue;
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
      for (int e = 0; e < config_.experts; ++e) {
        // Ranges of an expert lie end to end from 0.
        int64_t last = call.ranges[size_t(e + 1) * blocks - 1];
        size_t rows = size_t((last >> 32) + (last & 0xFFFFFFFF)), at = size_t(e * call.slots) * row_bytes;
        if (total * row_bytes >= kStreamFrom)
          copy_streaming(lease->data() + at, call.x + at, rows * row_bytes);
        else
          std::memcpy(lease->data() + at, call.x + at, rows * row_bytes);
      }
      fence();
    }
  }
  post(*op, call.arguments, nullptr, fine ? lease->offset : 0, fine ? bytes : 0, 0, fine ? nullptr : &bad, 0);
  stages_.push_back({op->seq, lease});
  if (routes.packed_slot >= 0 && packed_[routes.packed_slot].id == routes.id)
    packed_[routes.packed_slot].released = true;
  Operation* raw = op.get();
  op->complete = [this, raw, call, row_bytes] {
    fetch(*raw, call.waits);
    const Routes& way = *call.routes;
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
        rows[size_t(count)] = fetched_row(peer, raw->seq, way.row[at], int64_t(row_bytes));
        weights[size_t(count++)] = call.weights[at];
      }
      reduce(call.out + token * call.out_stride, call.type, rows.data(), weights.data(), count, nullptr, nullptr,
             call.type, size_t(call.columns));
    }
    acknowledge(*raw);
  };
  pending_.push_back(op);
  return op;
}

void Engine::run_worker() {
  std::unique_lock<std::mutex> hold(api_);
  for (;;) {
    idle_.wait(hold, [&] { return stop_worker_ || job_; });
    if (stop_worker_) return;
    // Calls of this rank wait for the job, so it has the engine to itself without holding the lock.
    auto job = std::move(job_);
    job_ = nullptr;
    hold.unlock();
    job();
    job = nullptr;
    hold.lock();
    job_running_ = false;
    idle_.notify_all();
  }
}

void Engine::close() {
  closing_ = true;
  {
    std::unique_lock<std::mutex> hold(api_);
    if (closed_) return;
    idle_.wait(hold, [&] { return !job_running_; });
    closed_ = true;
    stop_worker_ = true;
    idle_.notify_all();
  }
  if (worker_.joinable()) worker_.join();
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peer == config_.rank || !peers_[size_t(peer)].window) continue;
    flags_at(peer).state.fetch_or(kClosed, std::memory_order_seq_cst);
    ring(peer);
  }
  pending_.clear();
  stages_.clear();
  for (auto& slot : packed_) slot.lease.reset();
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peers_[size_t(peer)].pidfd >= 0) ::close(peers_[size_t(peer)].pidfd);
    peers_[size_t(peer)].pidfd = -1;
    if (peer != config_.rank) peers_[size_t(peer)].window.reset();
  }
}

}  // namespace hal_ep
