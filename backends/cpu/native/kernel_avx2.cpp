#include "simd_avx2.h"
// The vectors must be known before the kernel that is written in them.
#include "kernel.h"

namespace hal_cpu {
extern const Kernels kernels_avx2 = {"avx2", pack_query, attend, fold, finish};
}
