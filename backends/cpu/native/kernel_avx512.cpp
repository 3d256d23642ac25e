#include "simd_avx512.h"
// The vectors must be known before the kernel that is written in them.
#include "kernel.h"

namespace hal_cpu {
extern const Kernels kernels_avx512 = {"avx512", pack_query, attend, fold, finish};
}
