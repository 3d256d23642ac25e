#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#include "torch_team.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace hal_cpu {
namespace {

// A worker that just finished looks out for the next call this often before it sleeps: some hundred microseconds, which
// is about what it costs to wake it. While torch's threads are awake it is not ours that work.
constexpr int kLooks = 4000;
// A caller that is through before a worker sleeps sooner: the worker may be waiting for that very processor.
constexpr int kSpins = 200;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Round to nearest with subnormals kept, whatever the thread has set: a row's bits must not depend on who computes it.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(0UL));
  }
  ~DefaultFloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  unsigned long saved_;
#endif
};

struct Job {
  void (*work)(void*, int);
  void* context;
  int tasks;
  int seats;  // workers that may still join
  std::atomic<int> next{0};
  std::atomic<bool> out_of_memory{false};

  // Does not throw: the job lives on its caller's stack and must stay until every worker has left it.
  void take_all() {
    DefaultFloatMode mode;
    try {
      for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(context, task);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }

  void finish() const {
    if (out_of_memory) throw std::bad_alloc();
  }
};

thread_local TorchTeam torch_team;

class Pool {
 public:
  bool try_run(int threads, int tasks, void (*work)(void*, int), void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    const int helpers = (threads < tasks ? threads : tasks) - 1;
    Job job{work, context, tasks, helpers};
    if (torch_team.awake(threads)) {
      torch_team.run(threads, [](void* given) { static_cast<Job*>(given)->take_all(); }, &job);
      job.finish();
      return true;
    }
    grow(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      posted_.fetch_add(1, std::memory_order_release);
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.take_all();
    // Only workers that joined are waited for: one that wakes late finds the job withdrawn.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    for (int i = 0; i < kSpins && working_; ++i) {
      lock.unlock();
      relax();
      lock.lock();
    }
    idle_.wait(lock, [this] { return working_ == 0; });
    job.finish();
    return true;
  }

 private:
  void grow(int helpers) {
    for (; workers_ < helpers; ++workers_) {
      // Signals belong to the program's own threads.
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      bool started = true;
      try {
        std::thread(&Pool::serve, this).detach();
      } catch (const std::exception&) {
        started = false;  // the system refuses more threads: make do with those there are
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (!started) return;
    }
  }

  void serve() {
    unsigned seen = 0;
    for (;;) {
      for (int i = 0; i < kLooks && posted_.load(std::memory_order_acquire) == seen; ++i) relax();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return posted_.load(std::memory_order_relaxed) != seen; });
      seen = posted_.load(std::memory_order_relaxed);
      Job* job = job_;
      if (!job || job->seats == 0) continue;
      --job->seats;
      ++working_;
      lock.unlock();
      job->take_all();
      lock.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  std::mutex turn_;  // held by the caller whose job it is
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::atomic<unsigned> posted_{0};
  Job* job_ = nullptr;
  int working_ = 0;
  int workers_ = 0;
};

// Never destroyed: detached workers may outlive every static destructor.
alignas(Pool) unsigned char storage[sizeof(Pool)];
Pool* pool = nullptr;

// A forked child has none of the parent's threads and may have its locks held: it starts over.
void make_pool() { pool = new (storage) Pool; }

struct Start {
  Start() {
    make_pool();
    pthread_atfork(nullptr, nullptr, make_pool);
  }
} start;

}  // namespace

void run_parallel(int threads, int tasks, void (*work)(void*, int), void* context) {
  if (threads > 1 && tasks > 1 && pool->try_run(threads, tasks, work, context)) return;
  Job job{work, context, tasks, 0};
  job.take_all();
  job.finish();
}

}  // namespace hal_cpu
