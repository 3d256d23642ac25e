#include "simd_generic.h"
// The vectors must be known before the kernel that is written in them.
#include "kernel.h"

namespace hal_cpu {
extern const Kernels kernels_baseline = {"baseline", pack_query, attend, fold, finish};
}
