/* The words of MUSA C++ that the kernels use, on the host: threads are the fibres of hal/portable/dialects/host.cpp. */
#include <math.h>
#include <string.h>

extern "C" {
int hal_host_thread(), hal_host_group(), hal_host_groups();
void hal_host_barrier(int line);
float hal_host_shuffle_xor(float value, int offset, int width, int line);
}
struct Index {
  unsigned x;
};
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define threadIdx (Index{(unsigned)hal_host_thread()})
#define blockIdx (Index{(unsigned)hal_host_group()})
#define gridDim (Index{(unsigned)hal_host_groups()})
#define __syncthreads() hal_host_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, offset, width) hal_host_shuffle_xor(value, offset, width, __LINE__)

#define __threadfence_system() __atomic_thread_fence(__ATOMIC_SEQ_CST)
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
