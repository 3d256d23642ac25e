// Shared by the parts of the engine: names, checksums, texts, and the one way to wait.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>

#include "engine.h"

namespace hal_ep {

using Clock = std::chrono::steady_clock;

inline constexpr size_t kStreamFrom = size_t(6) << 20;  // writes of a call beyond which the caches are bypassed
inline constexpr auto kNap = std::chrono::milliseconds(20);
// Waking a sleeper takes some 50 us. Whoever sleeps sooner than that makes its peer wait as long, which sleeps in turn.
inline constexpr auto kSpin = std::chrono::microseconds(200), kCrowdedSpin = std::chrono::microseconds(2);

inline const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::dispatch: return "dispatch";
    case Kind::combine: return "combine";
    case Kind::low_latency_dispatch: return "low_latency_dispatch";
    case Kind::low_latency_combine: return "low_latency_combine";
    default: return "call";
  }
}

inline size_t up64(size_t n) { return (n + 63) & ~size_t(63); }

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline uint64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  return uint64_t(time.tv_sec) * 1000000000u + uint64_t(time.tv_nsec);
}

inline uint64_t mix(uint64_t sum, uint64_t value) {
  sum ^= value;
  sum *= 0x9E3779B97F4A7C15u;
  return sum ^ (sum >> 29);
}

inline uint64_t mix_words(uint64_t sum, const uint32_t* words, size_t count) {
  for (size_t i = 0; i + 1 < count; i += 2) sum = mix(sum, words[i] | uint64_t(words[i + 1]) << 32);
  return count % 2 ? mix(sum, words[count - 1]) : sum;
}

inline uint64_t checksum(const Post& post, uint64_t seq, const uint32_t* words, size_t count) {
  uint64_t sum = mix(seq, uint64_t(post.kind) | uint64_t(post.status) << 32);
  for (uint64_t value : post.arguments) sum = mix(sum, value);
  sum = mix(mix(mix(sum, post.offset), post.bytes), post.extra);
  return mix_words(sum, words, count);
}

inline uint64_t checksum(const Grant& grant, uint64_t seq, const uint32_t* words, size_t count) {
  uint64_t sum = mix(mix(mix(seq, uint64_t(grant.status)), grant.offset), grant.rows);
  return mix_words(mix(mix(sum, grant.wanted), grant.room), words, count);
}

// Text of a peer: never trusted to end.
inline std::string text_of(const char* at, size_t size) { return std::string(at, strnlen(at, size)); }

inline void set_text(Text& text, const char* argument, const std::string& got, const std::string& legal) {
  std::snprintf(text.argument, sizeof text.argument, "%s", argument);
  std::snprintf(text.got, sizeof text.got, "%s", got.c_str());
  std::snprintf(text.legal, sizeof text.legal, "%s", legal.c_str());
}

[[noreturn]] inline void throw_text(const Text& text, int rank) {
  Refused refused;
  refused.argument = text_of(text.argument, sizeof text.argument);
  refused.got = text_of(text.got, sizeof text.got);
  refused.legal = text_of(text.legal, sizeof text.legal);
  refused.rank = rank;
  throw refused;
}

// Spin, then give the core away, then sleep on the bell; look for dead, closed and failed peers while asleep.
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
  struct Over {
    Engine& engine;
    const Operation& op;
    Phase phase;
    ~Over() { engine.note(op, phase, -1, false); }
  } over{*this, op, phase};
  const int yields = job_running_ ? 0 : 2;
  const auto spin_end = start + (config_.crowded || job_running_ ? kCrowdedSpin : kSpin);
  do {
    for (int turn = 0; turn < 16 && !left_.empty(); ++turn) {
      relax();
      sweep();
    }
  } while (!left_.empty() && Clock::now() < spin_end);
  for (int turn = 0; turn < yields && !left_.empty(); ++turn) {
    sched_yield();
    sweep();
  }
  auto* header = reinterpret_cast<Header*>(window_->at(0));
  const double patience = 0.75 * config_.timeout;
  const auto suspicion = start + std::chrono::duration<double>(patience);
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
    if (closing_.load()) throw closed();
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
    if (lost.empty() && now >= suspicion) {
      // A silent rank that itself waits for another is not to blame; one that waits for this rank will speak first.
      std::vector<int> blamed;
      for (int peer : left_) {
        const int culprit = now >= deadline ? peer : who_blocks(peer, op, phase);
        if (culprit == config_.rank) continue;
        if (std::find(blamed.begin(), blamed.end(), culprit) == blamed.end()) blamed.push_back(culprit);
      }
      if (blamed.empty()) continue;
      lost = blamed;
      std::sort(lost.begin(), lost.end());
      char text[80];
      std::snprintf(text, sizeof text, "no answer within %g s", now >= deadline ? config_.timeout : patience);
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
      failure.expected = op.expected[size_t(lost[0])];
      failure.received = received(op, lost[0]);
      failure.expert = op.first_expert[size_t(lost[0])];
    }
    fail(failure);
  }
}

}  // namespace hal_ep
