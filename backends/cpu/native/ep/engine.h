// The protocol of one rank among the ranks of a node. No Python in here.
//
// Every call is one numbered operation on every rank. Dispatch: each source posts its counts to each destination;
// each destination, having all counts, allocates exactly what it will receive and grants every source its places; the
// sources write rows straight there and raise a flag. Low-latency dispatch has its memory beforehand: every rank posts all
// its counts to all, and finds its places itself. Combine: each rank stages its rows and posts where; each source
// fetches its rows and sums them in a fixed order. Who takes part at a destination is that destination's decision
// alone, so a rank that dies half way needs no vote.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "window.h"

namespace hal_ep {

struct RankFailed : std::exception {
  int rank = -1, expert = -1;
  int64_t expected = -1, received = -1;
  std::string phase, reason;
  const char* what() const noexcept override { return reason.c_str(); }
};

// A window as seen by a process outside the group.
struct Glimpse {
  uint64_t group;  // equal for the windows of one node's group; says nothing about its token
  int64_t pid;
  int rank, ranks, first_rank, all_ranks;
  double timeout;
  std::vector<uint32_t> states;  // what each rank told this one: PeerState
  std::vector<Record> records;   // oldest first
};
Glimpse inspect(int fd);  // std::invalid_argument where the file is no window

// A call that all ranks refuse alike; `field` is the index of a disagreeing argument, or -1 with the text filled in.
struct Refused : std::exception {
  std::string argument, got, legal;
  int field = -1, rank = -1, against = -1;
  uint64_t value = 0, other = 0;
  const char* what() const noexcept override { return argument.c_str(); }
};

struct Interrupted : std::exception {};

// One call at a time. The handler of a signal that comes while its own thread is in a call would wait for itself.
class Gate {
 public:
  void lock() {
    if (mine()) throw std::runtime_error("a signal's handler calls the buffer whose call it interrupts");
    lock_.lock();
    owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
  }
  void unlock() {
    owner_.store(std::thread::id(), std::memory_order_relaxed);
    lock_.unlock();
  }
  bool mine() const { return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

 private:
  std::mutex lock_;
  std::atomic<std::thread::id> owner_{std::thread::id()};
};

struct Fault {
  enum What : int { delay, drop, kill, stop, corrupt };
  What what;
  int phase;     // index into kPhases
  int64_t seq;   // operation number, -1 for every
  int target;    // rank, -1 for all
  double seconds;
};

enum Phase : uint32_t { kPost, kGrant, kPush, kReceive, kStage, kFetch, kAck, kPhaseCount };
extern const char* const kPhases[kPhaseCount];

enum class Policy : int { error, drop, grow };

struct Config {
  int rank, ranks;  // of this node
  int sources;      // ranks of the whole group for which each rank of this node speaks, at most
  int experts;
  int64_t expert_base;  // first expert of rank 0
  int first_rank;       // its number in the whole group, for messages
  double timeout;
  bool mask;
  int64_t room;  // rows a rank accepts in a normal dispatch
  Policy policy;
  bool crowded;   // more ranks than cores: give the core away early
  int all_ranks;  // of the whole group
};

// Of a received row: its token's position at the source, and the first of the token's choices that led here.
struct Source {
  int32_t position = -1, choice = -1;
};

// The way of every token: what a handle keeps.
struct Routes {
  int64_t tokens = 0, topk = 0;
  bool expand = false, packed = false;
  std::vector<int64_t> begin;          // [sources + 1] tokens of each virtual source
  std::vector<int32_t> rank, order;    // [tokens, topk] destination (-1 none), position within its block
  std::vector<int32_t> expert;         // [tokens, topk] local expert there
  std::vector<int32_t> row;            // [tokens, topk] row at the destination, -1 where dropped or masked
  std::vector<uint32_t> rows_to, experts_to;  // [ranks, sources], [ranks, sources, L]
  int64_t recv_rows = 0, dropped = 0;
  std::vector<Source> from;  // [received rows], once they are there; a copy, for handles outlive rows
  // What came, by block: block s * ranks + peer is what peer sent for its source s.
  std::vector<uint32_t> to_all;                        // [sources, all ranks] what each source sends to each rank
  std::vector<uint32_t> sent;                          // [blocks, all ranks] the same of every block
  std::vector<uint32_t> came, came_for;                // [blocks], [blocks, L]
  std::vector<std::pair<int64_t, int64_t>> came_at;    // [blocks], in the expand layout [L, blocks]: begin, count
  std::vector<int64_t> recv_experts;  // [L] aligned
  std::vector<std::pair<int64_t, int64_t>> own;  // received rows that came from this rank itself: begin, end; ascending
  uint64_t id = 0;
  int packed_slot = -1;
};

class Engine;

struct Operation {
  uint64_t seq = 0;
  Kind kind = Kind::none;
  std::atomic<bool> finished{false};  // also for whoever keeps the memory that it writes to
  std::exception_ptr error;
  std::function<void()> complete;
  std::shared_ptr<Routes> routes;
  std::shared_ptr<Lease> slot;            // dispatch: received rows
  std::vector<uint32_t> expected;         // [ranks] rows awaited
  std::vector<uint8_t> granted;           // [ranks] has been given places, and may write there
  std::vector<int> first_expert;          // [ranks]
  std::shared_ptr<int> use;               // packed: the result lives while someone holds this
  std::vector<uint8_t> copy;              // packed: rows of a call that returned before sending them
  // packed, sent behind the caller's back: when that began, and the microseconds until each rank's post was there
  std::chrono::steady_clock::time_point job_start;
  std::vector<int64_t> job_waits;
  int64_t rows = 0;                       // of the slot
  size_t x_at = 0, scales_at = 0, idx_at = 0, weights_at = 0, source_at = 0;  // offsets inside the slot
};

struct DispatchCall {
  const uint8_t* x = nullptr;
  int64_t tokens = 0, stride = 0, row_bytes = 0;
  const uint8_t* scales = nullptr;
  int64_t scales_stride = 0, scale_bytes = 0;
  const int64_t* idx = nullptr;
  int64_t topk = 0;
  const float* weights = nullptr;
  const int32_t* positions = nullptr;  // [tokens] at their sources; without them tokens are numbered from 0
  const uint32_t* sent = nullptr;      // [sources, all ranks]; without it the group is one node
  bool expand = false;
  int64_t alignment = 1, worst = 0;
  int64_t num_experts = 0;
  std::vector<int64_t> begin;  // [sources + 1]
  uint64_t arguments[kArguments] = {};
  std::shared_ptr<Routes> cached;
};

struct CombineCall {
  const uint8_t* x = nullptr;
  int64_t row_bytes = 0, columns = 0;
  Type type = Type::bf16, out_type = Type::bf16;
  std::shared_ptr<Routes> routes;
  const float* row_weights = nullptr;  // [rows, K] or [rows]: sent back beside the rows
  float* weights_out = nullptr;        // [n, K]
  const uint8_t* bias0 = nullptr;
  const uint8_t* bias1 = nullptr;
  int64_t bias0_stride = 0, bias1_stride = 0;
  uint8_t* out = nullptr;
  int64_t out_stride = 0;
  bool now = false;     // the caller waits: rows for this rank itself are read where they are
  bool gather = false;  // no sums: out is [n, K, row], every fetched row at its slot
  uint64_t arguments[kArguments] = {};
};

struct PackedCall {
  const uint8_t* x = nullptr;
  int64_t tokens = 0, stride = 0, columns = 0;
  Type type = Type::bf16;
  int cast = 0;  // 0 none, 1 fp8, 2 power of two, 3 ue8m0
  const int64_t* idx = nullptr;
  int64_t topk = 0, num_experts = 0, slots = 0;
  int32_t* stats = nullptr;
  int64_t* waits = nullptr;
  bool deferred = false;
  int32_t* count = nullptr;    // [L]
  int64_t* ranges = nullptr;   // [L, sources, ranks]
  const int32_t* positions = nullptr;
  std::vector<int64_t> begin;  // [sources + 1]
  std::shared_ptr<Operation> reserved;
  uint64_t arguments[kArguments] = {};
};

struct PackedCombineCall {
  const uint8_t* x = nullptr;
  int64_t columns = 0, slots = 0;
  Type type = Type::bf16;
  std::shared_ptr<Routes> routes;
  const int64_t* idx = nullptr;
  const float* weights = nullptr;
  uint8_t* out = nullptr;
  int64_t out_stride = 0;
  int64_t* waits = nullptr;
  bool now = false;
  bool gather = false;  // no sums: out is [n, K, row], every fetched row at its slot
  std::shared_ptr<Lease> lent;  // zero copy: x is this memory
  const int64_t* ranges = nullptr;
  uint64_t arguments[kArguments] = {};
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  Engine(const Config& config, const uint8_t token[32]);
  ~Engine();

  int fd() const { return window_->fd(); }
  void attach(int peer, int fd, int pidfd);
  void attach_direct(int peer, std::shared_ptr<Window> window);  // ranks that are threads of one process
  std::shared_ptr<Window> window() { return window_; }
  void set_faults(std::vector<Fault> faults) { faults_ = std::move(faults); }

  std::shared_ptr<Operation> dispatch(const DispatchCall& call);
  std::shared_ptr<Operation> combine(const CombineCall& call);
  // The memory of a coming packed_dispatch, so that its tensors exist before the call is made.
  std::shared_ptr<Operation> packed_reserve(const PackedCall& call);
  std::shared_ptr<Operation> packed_dispatch(const PackedCall& call);
  std::shared_ptr<Operation> packed_combine(const PackedCombineCall& call);
  std::shared_ptr<Lease> lend(uint64_t bytes, bool commit) { return arena_->take(bytes, commit); }
  void release(const std::shared_ptr<Routes>& routes);  // packed: the result is used up
  void finish(const std::shared_ptr<Operation>& op);
  [[noreturn]] void refuse(const Text& text);
  void set_mask(int rank, bool masked);
  std::vector<bool> masked() const;
  std::vector<Record> records(int rank);
  uint64_t bytes() const { return window_->size(); }
  uint64_t in_use() const { return arena_->in_use(); }
  void close();

  // Called every few naps while waiting; may throw Interrupted.
  std::function<void()> poll_signals;

 private:
  struct Peer {
    std::shared_ptr<Window> window;
    int pidfd = -1;
    bool masked = false;
  };

  Flags& flags_from(int peer) const;   // in the own window, written by peer
  Flags& flags_at(int peer) const;     // in peer's window, written by this rank
  Post& post_from(int peer, uint64_t seq) const;
  Post& post_at(int peer, uint64_t seq) const;
  Grant& grant_from(int peer, uint64_t seq) const;
  Grant& grant_at(int peer, uint64_t seq) const;
  const uint32_t* post_rows(const Post& post) const { return reinterpret_cast<const uint32_t*>(&post + 1); }
  // Whether destinations of a low-latency dispatch grant places: where ranks may be carried on without, who takes part is
  // the destination's decision. Otherwise every source knows all counts and finds its places without asking.
  bool granting() const { return config_.mask || config_.sources > 1; }
  size_t post_words(Kind kind) const;
  const uint32_t* packed_counts(int peer, uint64_t seq, int destination) const;
  void ring(int peer);
  std::string number(int peer) const { return std::to_string(config_.first_rank + peer); }

  template <class Ready>
  void wait(Phase phase, const Operation& op, int64_t* waits, Ready ready);
  [[noreturn]] void fail(RankFailed failure);
  void check_abort(int peer);
  bool dead(int peer) const;
  int who_blocks(int peer, const Operation& op, Phase phase);
  void mask_now(int peer);
  bool lost(const Operation& op, int peer) const;
  bool alive(int peer) const { return !peers_[peer].masked; }

  std::shared_ptr<Operation> begin(Kind kind, std::shared_ptr<Operation> op = nullptr);
  void enter();
  RankFailed closed() const;
  void post(Operation& op, const uint64_t* arguments, const Routes* routes, uint64_t offset, uint64_t bytes,
            uint64_t extra, const Text* refusal, int round, const std::vector<int>* only = nullptr);
  void check_posts(const Operation& op, int round);
  void give_up(const Operation& op);
  bool route(Routes& routes, const int64_t* idx, int64_t num_experts, Text* bad) const;
  bool grant(Operation& op, const DispatchCall& call, int round);
  void give(const Operation& op, int round, Status status, uint64_t offset, uint64_t rows, uint64_t wanted,
            const std::vector<uint32_t>& starts, size_t per_source);
  std::vector<int> check_grants(Operation& op, int round, const std::vector<int>* only);
  void shorten(Operation& op, const std::vector<int>& where);
  void push(Operation& op, const DispatchCall& call, const int64_t* idx);
  void send_done(Operation& op);
  void receive(Operation& op, int64_t* waits);
  std::shared_ptr<Operation> reserve(const PackedCall& call);
  void packed_body(Operation& op, const PackedCall& call);
  void count_packed(Operation& op, const PackedCall& call);
  void find_starts(const Operation& op, std::vector<uint32_t>& starts) const;
  void fetch(Operation& op, int64_t* waits);
  void acknowledge(const Operation& op);
  void settle(Operation& op);
  bool fault(Phase phase, uint64_t seq, int target);
  uint32_t received(const Operation& op, int peer) const;
  void note(const Operation& op, Phase phase, int waits_for, bool end);
  void release_stages();
  const uint8_t* fetched_row(int peer, uint64_t seq, int64_t row, int64_t row_bytes);
  void run_worker();

  Config config_;
  Map map_;
  std::shared_ptr<Window> window_;
  std::shared_ptr<Arena> arena_;
  std::vector<Peer> peers_;
  std::vector<Fault> faults_;
  uint64_t seq_ = 0;
  std::deque<std::shared_ptr<Operation>> pending_;
  struct Stage {
    uint64_t seq;
    std::shared_ptr<Lease> lease;
  };
  std::deque<Stage> stages_;
  // Memory that a masked rank may still write to, should it wake up.
  std::vector<std::shared_ptr<Lease>> abandoned_;
  std::unique_ptr<RankFailed> broken_;
  bool closed_ = false;
  std::atomic<bool> closing_{false};
  std::chrono::steady_clock::time_point asked_;  // since when the caller has been waiting

  // A forked child has a copy of this engine that is its parent's. It tells nobody anything, and cannot take apart the
  // thread that it does not have nor the condition on which that waits.
  const pid_t pid_ = getpid();
  struct Threads {
    std::condition_variable_any idle;
    std::thread worker;
  };
  Threads* threads_ = new Threads;

  Gate api_;
  std::condition_variable_any& idle_ = threads_->idle;  // the worker has finished its job
  std::thread& worker_ = threads_->worker;
  std::function<void()> job_;
  bool job_running_ = false, stop_worker_ = false;
  struct PackedSlot {
    std::shared_ptr<Lease> lease;
    std::weak_ptr<int> use;
    uint64_t id = 0;
    bool released = true;
  };
  PackedSlot packed_[2];
  std::vector<int> left_;
};

}  // namespace hal_ep
