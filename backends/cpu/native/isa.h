// The kernels compiled for each instruction set, and the choice among them.
#pragma once

#include <atomic>

#include "problem.h"

namespace hal_cpu {

struct Isa {
  const Kernels* kernels;
  bool (*supported)();
  std::atomic<unsigned long long> launches{0};

  Isa(const Kernels* k, bool (*s)()) : kernels(k), supported(s) {}
};

// The one in force; the best supported one until select_isa() says otherwise.
Isa& chosen_isa();

}  // namespace hal_cpu
