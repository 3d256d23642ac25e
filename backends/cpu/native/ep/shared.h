// What lies in a peer window. Every rank owns one window; each field below names its single writer.
//
// All ranks of a node map all windows. A rank waits only on flags in its own window, so that one futex word (`bell`)
// is enough to wake it. Flags are 64-bit operation numbers that only grow.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace hal_ep {

constexpr char kMagic[8] = {'H', 'A', 'L', '-', 'E', 'P', '0', '3'};
constexpr uint32_t kRing = 16;       // operations whose mail may be unread at once
constexpr uint32_t kArguments = 16;  // values of a call that must agree on all ranks
constexpr uint32_t kRecords = 64;    // entries of the flight recorder
constexpr size_t kPage = 4096;

enum class Kind : uint32_t { none, dispatch, combine, low_latency_dispatch, low_latency_combine };
enum class Status : uint32_t { ok, refused, overflow, shorten };

struct Text {
  char argument[48];
  char got[208];
  char legal[256];
};

// Owner: the window's rank. `bell` and `sleepers` are also written by whoever rings or sleeps.
struct Header {
  char magic[8];
  uint32_t rank, ranks, sources, experts, all_ranks;  // experts: L
  uint64_t control_bytes;
  int32_t first_rank;  // of this node in the whole group; like the next two for whoever looks from outside
  int64_t pid;
  double timeout;
  uint8_t token[32];
  alignas(64) std::atomic<uint32_t> bell;
  alignas(64) std::atomic<uint32_t> sleepers;
};

// One for each peer; writer: that peer.
struct alignas(128) Flags {
  std::atomic<uint64_t> done;      // its rows of this operation are in the owner's memory
  std::atomic<uint64_t> progress;  // rows it has written in the operation under way
  std::atomic<uint64_t> ack;       // it has read the owner's staged rows of this operation
  std::atomic<uint32_t> state;     // PeerState
  alignas(64) int32_t failed_rank;
  int32_t failed_expert;
  int64_t failed_expected, failed_received;
  char failed_phase[32];
  char failed_reason[192];
};

enum PeerState : uint32_t { kOpen = 0, kFailed = 1, kClosed = 2, kMaskedYou = 4 };

// Mail from a source: what it is about to send. Writer: the source. Followed by rows[sources], experts[sources][L],
// and for whoever asks who sends how much to whom, all[sources][all ranks]; in the low-latency mode of ranks that find
// their places themselves, by everywhere[ranks][L] alone: what it sends to each.
struct alignas(64) Post {
  std::atomic<uint64_t> seq;
  Kind kind;
  Status status;
  uint64_t check;  // over everything below but the text
  uint64_t arguments[kArguments];
  uint64_t offset, bytes;  // combine: where the rows to fetch are staged; everywhere: the slot it receives into
  uint64_t extra;          // combine: where their weights are
  Text text;               // of a refused call
};

// Mail from a destination: where the rows go. Writer: the destination. Followed by
// start[sources][L] (in the rank layout start[sources]), or by accept[sources] where status is `shorten`.
struct alignas(64) Grant {
  std::atomic<uint64_t> seq;
  Status status;
  uint64_t check;
  uint64_t offset;        // of the slot in the destination's window
  uint64_t rows;          // rows of the slot
  uint64_t wanted, room;  // for the overflow error
};

// Flight recorder. Writer: the owner.
struct Record {
  uint64_t seq;
  Kind kind;
  uint32_t phase;    // index into phase_name
  int32_t waits_for; // lowest rank waited for, -1
  uint32_t tokens;
  int32_t expert;               // first expert that rows of that rank are for, -1
  uint32_t expected, received;  // rows of that rank, while rows are waited for
  uint64_t begin_ns, end_ns;  // CLOCK_REALTIME; end 0 while under way
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// Offsets of the parts of a window's control area, the same for all windows of a group.
struct Map {
  uint32_t ranks, sources, experts, all_ranks;
  size_t flags, posts, grants, records, post_bytes, grant_bytes, end;

  Map(uint32_t ranks_, uint32_t sources_, uint32_t experts_, uint32_t all_ranks_)
      : ranks(ranks_), sources(sources_), experts(experts_), all_ranks(all_ranks_) {
    auto up = [](size_t n, size_t to) { return (n + to - 1) / to * to; };
    const size_t words = size_t(sources) * (1 + size_t(experts) + all_ranks), everywhere = size_t(ranks) * experts;
    post_bytes = up(sizeof(Post) + 4 * (sources > 1 || words > everywhere ? words : everywhere), 64);
    grant_bytes = up(sizeof(Grant) + 4 * (size_t(sources) * experts + sources), 64);
    flags = up(sizeof(Header), kPage);
    posts = up(flags + sizeof(Flags) * ranks, kPage);
    grants = up(posts + post_bytes * ranks * kRing, kPage);
    records = up(grants + grant_bytes * ranks * kRing, kPage);
    end = up(records + sizeof(Record) * kRecords, kPage);
  }
};

}  // namespace hal_ep
