// A small pool of worker threads next to torch's own.
#pragma once

namespace hal_cpu {

// Calls work(context, task) for every task in [0, tasks) on up to `threads` threads, the caller included, and returns
// when all are done. Which thread takes which task is left open, so no result may depend on it. Runs alone on the
// calling thread where the pool is busy with another caller's tasks.
void run_parallel(int threads, int tasks, void (*work)(void*, int), void* context);

}  // namespace hal_cpu
