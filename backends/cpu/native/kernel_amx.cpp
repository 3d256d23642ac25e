#define HAL_CPU_TILES
#include "simd_avx512.h"
// The vectors must be known before the kernel that is written in them.
#include "kernel.h"

namespace hal_cpu {
extern const Kernels kernels_amx = {"amx", pack_query, attend, fold, finish};
}
