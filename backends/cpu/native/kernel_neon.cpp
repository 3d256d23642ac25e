#include "simd_neon.h"
// The vectors must be known before the kernel that is written in them.
#include "kernel.h"

namespace hal_cpu {
extern const Kernels kernels_neon = {"neon", pack_query, attend, fold, finish};
}
