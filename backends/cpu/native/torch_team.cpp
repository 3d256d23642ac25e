#include "torch_team.h"

#include <dlfcn.h>

#include <atomic>
#include <fstream>
#include <sstream>
#include <string>

namespace hal_cpu {
namespace {

// What torch is linked with, found through it: there may be other copies of an OpenMP library in the process, with
// threads of their own. All of them have GNU's entry, and none is needed.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
};

// OpenMP's threads do not survive a fork, which it does not notice: it would wait for them for ever.
std::atomic<bool> forked{false};

// Whether this process was forked before this library was there, and has run nothing else since. So says the kernel;
// where it cannot be asked, it is taken for yes.
bool born_forked() {
  constexpr unsigned long kForkedNotExecuted = 0x40;  // PF_FORKNOEXEC
  std::string line, skipped;
  std::getline(std::ifstream("/proc/self/stat"), line);
  const size_t name_ends = line.rfind(')');
  if (name_ends == line.npos) return true;
  std::istringstream fields(line.substr(name_ends + 1));
  for (int i = 0; i < 6; ++i) fields >> skipped;
  unsigned long flags;
  return !(fields >> flags) || flags & kForkedNotExecuted;
}

const OpenMp& openmp() {
  static const OpenMp found = [] {
    OpenMp api;
#if defined(__linux__)
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    if (born_forked()) return api;
    if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
      api.parallel = reinterpret_cast<decltype(api.parallel)>(dlsym(torch, "GOMP_parallel"));
      api.max_threads = reinterpret_cast<decltype(api.max_threads)>(dlsym(torch, "omp_get_max_threads"));
    }
#endif
    return api.max_threads ? api : OpenMp();
  }();
  return found;
}

// No clock has this number.
constexpr clockid_t kNone = -1;

// A thread's own processor time, as others may read it.
clockid_t clock_of(pthread_t thread) {
  clockid_t clock = kNone;
#if defined(__linux__)
  pthread_getcpuclockid(thread, &clock);
#endif
  return clock;
}

// Nanoseconds; -1 if the thread has ended.
long long time_of(clockid_t clock) {
  timespec time;
  return clock_gettime(clock, &time) ? -1 : time.tv_sec * 1000000000LL + time.tv_nsec;
}

}  // namespace

bool TorchTeam::awake(int threads) {
  const OpenMp& api = openmp();
  // A team of another size would have to be made anew, here and for torch's next operation again.
  if (!api.parallel || forked || api.max_threads() != threads) return false;
  if (threads_ != threads) return true;
  if (worker_ == kNone) return false;
  const long long before = time_of(worker_);
  if (before < 0) return true;
  return time_of(worker_) != before;
}

void TorchTeam::run(int threads, void (*work)(void*), void* context) {
  struct Region {
    void (*work)(void*);
    void* context;
    pthread_t caller;
    std::atomic<clockid_t> worker;
  } region{work, context, pthread_self(), {kNone}};
  openmp().parallel(
      [](void* given) {
        Region& region = *static_cast<Region*>(given);
        if (!pthread_equal(pthread_self(), region.caller))
          region.worker.store(clock_of(pthread_self()), std::memory_order_relaxed);
        region.work(region.context);
      },
      &region, threads, 0);
  worker_ = region.worker;
  threads_ = threads;
}

}  // namespace hal_cpu
