#include "isa.h"

#include "decode.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(HAL_CPU_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hal_cpu {

extern const Kernels kernels_baseline;

namespace {

bool always() { return true; }

}  // namespace

#if defined(__x86_64__)

extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;
#ifdef HAL_CPU_AMX
extern const Kernels kernels_amx;
#endif

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

#if defined(HAL_CPU_AMX) && defined(HAL_CPU_EMULATED_TILES)

Isa isas[] = {{&kernels_amx, has_avx512bf16, always}, {&kernels_baseline, always}};

#else

#if defined(HAL_CPU_AMX) && defined(__linux__)

constexpr unsigned long kTileData = 18;  // of the states that Linux saves for a thread

bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kWhatThereIs = 0x1021;
  unsigned a, b, c, d;
  unsigned long states = 0;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTiles) &&
         syscall(SYS_arch_prctl, kWhatThereIs, &states) == 0 && (states >> kTileData & 1);
}

// For the whole process, whose signals then need larger stacks: hence not before somebody wants it.
bool grant_amx() {
  constexpr long kAskFor = 0x1023;
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}

#elif defined(HAL_CPU_AMX)

bool has_amx() { return false; }
bool grant_amx() { return false; }

#endif

Isa isas[] = {
#ifdef HAL_CPU_AMX
    {&kernels_amx, has_amx, grant_amx},
#endif
    {&kernels_avx512bf16, has_avx512bf16},
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
    {&kernels_baseline, always}};

#endif

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
    if (!isa.granted && isa.supported()) return &isa;
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
    if (name != isa.kernels->name || !isa.supported() || (isa.granted && !isa.granted())) continue;
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
