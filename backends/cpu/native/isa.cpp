#include "isa.h"

#include "decode.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hal_cpu {

extern const Kernels kernels_baseline;

namespace {

bool always() { return true; }

}  // namespace

#if defined(__x86_64__)

extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;

namespace {

bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// The builtins also ask whether the operating system saves these registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

Isa isas[] = {{&kernels_avx512bf16, has_avx512bf16},
              {&kernels_avx512, has_avx512},
              {&kernels_avx2, has_avx2},
              {&kernels_baseline, always}};

}  // namespace

#elif defined(__aarch64__)

extern const Kernels kernels_neon;

namespace {
Isa isas[] = {{&kernels_neon, always}, {&kernels_baseline, always}};
}

#else

namespace {
Isa isas[] = {{&kernels_baseline, always}};
}

#endif

namespace {

Isa* best() {
  for (Isa& isa : isas)
    if (isa.supported()) return &isa;
  return nullptr;  // not reached: the baseline always is
}

std::atomic<Isa*> chosen{nullptr};

}  // namespace

Isa& chosen_isa() {
  Isa* isa = chosen.load(std::memory_order_acquire);
  if (!isa) chosen.store(isa = best(), std::memory_order_release);
  return *isa;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa& isa : isas)
    if (isa.supported()) names.push_back(isa.kernels->name);
  return names;
}

std::string current_isa() { return chosen_isa().kernels->name; }

bool select_isa(const std::string& name) {
  for (Isa& isa : isas) {
    if (name != isa.kernels->name || !isa.supported()) continue;
    chosen.store(&isa, std::memory_order_release);
    return true;
  }
  return false;
}

std::vector<LaunchCount> launch_counts() {
  std::vector<LaunchCount> counts;
  for (Isa& isa : isas)
    if (isa.launches) counts.push_back({isa.kernels->name, isa.launches});
  return counts;
}

}  // namespace hal_cpu
