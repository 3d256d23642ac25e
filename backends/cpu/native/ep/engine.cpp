// Life of an engine: peers, failures, finishing, the recorder, the worker, the end.
#include "detail.h"

#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <tuple>

namespace hal_ep {

const char* const kPhases[kPhaseCount] = {"post", "grant", "push", "receive", "stage", "fetch", "acknowledge"};

Engine::Engine(const Config& config, const uint8_t token[32])
    : config_(config), map_(uint32_t(config.ranks), uint32_t(config.sources), uint32_t(config.experts), uint32_t(config.all_ranks)) {
  window_ = Window::create(map_, uint32_t(config.rank), token);
  auto* header = reinterpret_cast<Header*>(window_->at(0));
  header->first_rank = config.first_rank;
  header->pid = pid_;
  header->timeout = config.timeout;
  arena_ = std::make_shared<Arena>(window_, map_.end);
  peers_.resize(size_t(config.ranks));
  peers_[size_t(config.rank)].window = window_;
}

Engine::~Engine() {
  close();
  if (getpid() == pid_) delete threads_;
}

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

// Follow the recorders from a rank that waits to the one it waits for, to one that waits for nobody. Where they lead in
// a circle, someone waits for what the next one believes to have sent: to blame is whoever got furthest.
int Engine::who_blocks(int peer, const Operation& op, Phase phase) {
  struct Step {
    int rank;
    uint64_t seq;
    uint32_t phase;
  };
  std::vector<Step> path{{config_.rank, op.seq, phase}};
  for (int at = peer;;) {
    auto seen = std::find_if(path.begin(), path.end(), [&](const Step& step) { return step.rank == at; });
    if (seen != path.end()) {
      auto further = [](const Step& a, const Step& b) { return std::tie(a.seq, a.phase) < std::tie(b.seq, b.phase); };
      return std::max_element(seen, path.end(), further)->rank;
    }
    std::vector<Record> past = records(at);
    auto last = std::find_if(past.rbegin(), past.rend(), [](const Record& r) { return r.end_ns == 0 && r.waits_for >= 0; });
    if (last == past.rend() || last->waits_for >= config_.ranks || !alive(last->waits_for)) return at;
    path.push_back({at, last->seq, last->phase});
    at = last->waits_for;
  }
}

void Engine::mask_now(int peer) {
  peers_[size_t(peer)].masked = true;
  flags_at(peer).state.fetch_or(kMaskedYou, std::memory_order_seq_cst);
  ring(peer);
}

// Whether a rank was given places and is gone before it filled them.
bool Engine::lost(const Operation& op, int peer) const {
  return !alive(peer) && op.granted[size_t(peer)] != 0 &&
         flags_from(peer).done.load(std::memory_order_acquire) < op.seq;
}

void Engine::set_mask(int rank, bool masked) {
  std::unique_lock<Gate> hold(api_);
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
  record.expert = -1;
  record.expected = record.received = 0;
  if (phase == kReceive && waits_for >= 0 && size_t(waits_for) < op.expected.size()) {
    record.expert = op.first_expert[size_t(waits_for)];
    record.expected = op.expected[size_t(waits_for)];
    record.received = received(op, waits_for);
  }
  if (end) record.end_ns = now_ns();
}

namespace {

std::vector<Record> records_at(const uint8_t* at) {
  std::vector<Record> found;
  const auto* ring = reinterpret_cast<const Record*>(at);
  for (uint32_t i = 0; i < kRecords; ++i)
    if (ring[i].seq != 0 && ring[i].phase < kPhaseCount) found.push_back(ring[i]);
  std::sort(found.begin(), found.end(), [](const Record& a, const Record& b) { return a.seq < b.seq; });
  return found;
}

}  // namespace

std::vector<Record> Engine::records(int rank) {
  if (!peers_[size_t(rank)].window) return {};
  return records_at(peers_[size_t(rank)].window->at(map_.records));
}

Glimpse inspect(int fd) {
  struct stat info;
  if (fstat(fd, &info) != 0 || uint64_t(info.st_size) < sizeof(Header))
    throw std::invalid_argument("the file is not a peer window");
  struct Mapping {
    size_t size;
    void* at;
    ~Mapping() { munmap(at, size); }
  } mapping{size_t(info.st_size), mmap(nullptr, size_t(info.st_size), PROT_READ, MAP_SHARED, fd, 0)};
  if (mapping.at == MAP_FAILED) throw std::invalid_argument("the file cannot be read");
  const auto* bytes = static_cast<const uint8_t*>(mapping.at);
  const auto* header = reinterpret_cast<const Header*>(bytes);
  if (std::memcmp(header->magic, kMagic, 8) != 0) throw std::invalid_argument("the file is not a peer window");
  const Map map(header->ranks, header->sources, header->experts, header->all_ranks);
  if (header->ranks > 65536 || map.end != header->control_bytes || mapping.size < map.end)
    throw std::invalid_argument("the window has an impossible geometry");
  Glimpse seen{};
  seen.group = 0;
  for (size_t i = 0; i < sizeof header->token; i += 8) {
    uint64_t word;
    std::memcpy(&word, header->token + i, 8);
    seen.group = mix(seen.group, word);
  }
  seen.pid = header->pid;
  seen.rank = int(header->rank), seen.ranks = int(header->ranks);
  seen.first_rank = header->first_rank, seen.all_ranks = int(header->all_ranks);
  seen.timeout = header->timeout;
  const auto* flags = reinterpret_cast<const Flags*>(bytes + map.flags);
  for (uint32_t i = 0; i < header->ranks; ++i) seen.states.push_back(flags[i].state.load(std::memory_order_acquire));
  seen.records = records_at(bytes + map.records);
  return seen;
}

// Rows of an operation that a rank has written so far, as it says.
uint32_t Engine::received(const Operation& op, int peer) const {
  const uint64_t progress = flags_from(peer).progress.load(std::memory_order_acquire);
  if (progress >> 32 != (op.seq & 0xFFFFFFFF)) return 0;
  return std::min(uint32_t(progress), op.expected[size_t(peer)]);
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

RankFailed Engine::closed() const {
  RankFailed failure;
  failure.rank = config_.rank;
  failure.phase = "call";
  failure.reason = "this buffer is closed";
  return failure;
}

void Engine::enter() {
  if (closed_ || closing_.load()) throw closed();
  if (broken_) throw *broken_;
  asked_ = Clock::now();
  while (pending_.size() >= kRing - 4) settle(*pending_.front());
}

std::shared_ptr<Operation> Engine::begin(Kind kind, std::shared_ptr<Operation> op) {
  enter();
  if (!op) op = std::make_shared<Operation>();
  op->seq = ++seq_;
  op->kind = kind;
  op->expected.assign(size_t(config_.ranks), 0);
  op->first_expert.assign(size_t(config_.ranks), -1);
  op->granted.assign(size_t(config_.ranks), 0);
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
  const auto asked = Clock::now();
  std::unique_lock<Gate> hold(api_);
  idle_.wait(hold, [&] { return !job_running_; });
  asked_ = asked;
  while (!op->finished) {
    if (pending_.empty()) {
      enter();
      return;
    }
    settle(*pending_.front());
  }
  if (op->error) std::rethrow_exception(op->error);
}

void Engine::run_worker() {
  std::unique_lock<Gate> hold(api_);
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
  if (getpid() != pid_) return;
  closing_ = true;
  // From a signal's handler: the call that it interrupts ends, and whoever closes next does the rest.
  if (api_.mine()) return;
  {
    std::unique_lock<Gate> hold(api_);
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
  abandoned_.clear();
  for (auto& slot : packed_) slot.lease.reset();
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peers_[size_t(peer)].pidfd >= 0) ::close(peers_[size_t(peer)].pidfd);
    peers_[size_t(peer)].pidfd = -1;
    if (peer != config_.rank) peers_[size_t(peer)].window.reset();
  }
}

}  // namespace hal_ep
