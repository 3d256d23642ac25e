// One decode step: check the indices, schedule, run the kernels of the chosen instruction set.
#pragma once

#include <string>
#include <vector>

#include "problem.h"
#include "schedule.h"

namespace hal_cpu {

// An index that would have been read through, or a schedule made for something else.
struct Fault {
  enum Kind { kNone, kLengths, kTable, kQueries, kPlan, kTooLarge } kind = kNone;
  int row = 0, column = 0;
  int64_t value = 0;
};

// Everything of a call but the tensors that Problem already holds.
struct Call {
  Problem problem;
  Shape shape;
  const int32_t* lengths;
  const int32_t* first_query;  // null unless ragged
  int64_t total_queries;
  int num_blocks, max_blocks;
  int threads;
};

// Checks what a schedule reads: lengths and query offsets. total_queries -1: not known yet.
Fault check_lengths(const Shape& shape, const int32_t* lengths, const int32_t* first_query, int64_t total_queries);

// Runs the call with `plan`, or with a schedule of its own where that is null.
Fault decode(const Call& call, const Schedule* plan);

// Instruction sets this processor can execute, best first.
std::vector<std::string> available_isas();
std::string current_isa();
// False: not one of available_isas().
bool select_isa(const std::string& name);

struct LaunchCount {
  std::string isa;
  unsigned long long launches;
};
std::vector<LaunchCount> launch_counts();

}  // namespace hal_cpu
