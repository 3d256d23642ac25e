// The kernels compiled for each instruction set, and the choice among them.
#pragma once

#include <atomic>

#include "problem.h"

namespace hal_cpu {

struct Isa {
  const Kernels* kernels;
  bool (*supported)();
  // Asks for what the operating system gives only to who asks. Null: nothing is needed. One that has it is never taken
  // by itself.
  bool (*granted)();
  std::atomic<unsigned long long> launches{0};

  Isa(const Kernels* k, bool (*s)(), bool (*g)() = nullptr) : kernels(k), supported(s), granted(g) {}
};

// The one in force; the best one to be had unasked until select_isa() says otherwise.
Isa& chosen_isa();

}  // namespace hal_cpu
