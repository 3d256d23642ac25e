/* C++ on the host: a group's threads are fibres of one thread, which change places where they wait for each other. */
#include <math.h>
#include <string.h>

#define HAL_INLINE static inline
#define HAL_KERNEL(threads) extern "C" __attribute__((visibility("default")))
/* Groups run one after the other, so that one copy of local memory serves them all. */
#define HAL_SHARED(type, name, count) alignas(16) static type name[count]
#define HAL_UNROLL

extern "C" {
/* Of the simulator behind the kernels, dialects/host.cpp. */
int hal_host_thread(), hal_host_group(), hal_host_groups();
void hal_host_barrier(int line);
float hal_host_shuffle_xor(float value, int offset, int width, int line);
}
#define HAL_THREAD hal_host_thread()
#define HAL_GROUP hal_host_group()
#define HAL_GROUPS hal_host_groups()
#define HAL_BARRIER() hal_host_barrier(__LINE__)
#define HAL_SHUFFLE_XOR(mask, value, offset, width) hal_host_shuffle_xor(value, offset, width, __LINE__)
#define HAL_ALL_LANES 0

#define HAL_EXP2(x) exp2f(x)
#define HAL_LOG2(x) log2f(x)
#define HAL_FMAX(x, y) fmaxf(x, y)
#define HAL_FMA(x, y, z) ((x) * (y) + (z))

#define HAL_MUL(x, y) ((x) * (y))
#define HAL_STORE_RELEASE(p, x) __atomic_store_n(p, x, __ATOMIC_RELEASE)
#define HAL_LOAD_ACQUIRE(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)

static inline unsigned int hal_as_u32(float x) {
  unsigned int bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline float hal_as_float(unsigned int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
#define HAL_AS_U32(x) hal_as_u32(x)
#define HAL_AS_FLOAT(x) hal_as_float(x)

/* Memory of the device by its address. */
#define HAL_AT(type, address) ((type *)(address))

#include "cxx.h"
