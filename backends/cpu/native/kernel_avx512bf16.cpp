#include "simd_avx512.h"
// The vectors must be known before the kernel that is written in them.
#include "kernel.h"

namespace hal_cpu {
extern const Kernels kernels_avx512bf16 = {"avx512bf16", pack_query, attend, fold, finish};
}
