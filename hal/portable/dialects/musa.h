/* MUSA C++ as mcc compiles it: CUDA's words, subgroups of 128 lanes up to architecture 22 and of 32 from 31 on. */
#include "simt.h"

/* The mask of a shuffle names 32 lanes. What it says of the others of a wider subgroup is nowhere written, so shuffles are
 * for subgroups of that width alone; on others HAL_SUBGROUP is 1. */
#if HAL_SUBGROUP > 32
#error "HAL_SUBGROUP: a mask of 32 bits does not name the lanes of wider subgroups; 1 does without shuffles"
#endif
#define HAL_SHUFFLE_XOR(mask, value, offset, width) __shfl_xor_sync(mask, value, offset, width)
#define HAL_ALL_LANES 0xffffffffu
#define HAL_AS_U32(x) __float_as_uint(x)
#define HAL_AS_FLOAT(x) __uint_as_float(x)
/* A product rounded for itself; stores and loads that order other memory for every device and the host. */
#define HAL_MUL(x, y) __fmul_rn(x, y)
#define HAL_STORE_RELEASE(p, x) (__threadfence_system(), (void)(*(volatile hal_u32 *)(p) = (x)))
#define HAL_LOAD_ACQUIRE(p) hal_load_acquire(p)
HAL_INLINE unsigned int hal_load_acquire(const unsigned int *p) {
  unsigned int found = *(const volatile unsigned int *)p;
  __threadfence_system();
  return found;
}
/* Half precision is converted with integers, by kernels/elements.h. */

/* Memory of the device by its address. */
#define HAL_AT(type, address) ((type *)(address))

#include "cxx.h"
