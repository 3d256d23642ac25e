// Torch's own OpenMP threads, borrowed while they are awake.
//
// They spin for milliseconds after each of torch's operations. Where there are as many as processors, a thread of ours
// that is woken meanwhile has to share a processor with one that only waits; and theirs need no waking. Asleep they are
// of no use: OpenMP's caller waits for all of them, which may be milliseconds where ours would have been skipped.
#pragma once

#include <pthread.h>
#include <time.h>

namespace hal_cpu {

// Of one calling thread: OpenMP keeps a team for each.
class TorchTeam {
 public:
  // Whether the calling thread's team is of so many threads and one of them runs, which is to say spins. Says yes too
  // where it is still to be learned who they are.
  bool awake(int threads);

  // Calls work(context) on every thread of the team, the caller included, and returns when all have.
  void run(int threads, void (*work)(void*), void* context);

 private:
  int threads_ = 0;  // of the team that was run last
  clockid_t worker_ = 0;
};

}  // namespace hal_cpu
