/* HIP C++, compiled by clang: half precision is a type of the language. */
#include "simt.h"

/* All lanes of a wavefront run together: there is no mask to give. */
#define HAL_SHUFFLE_XOR(mask, value, offset, width) __shfl_xor(value, offset, width)
#define HAL_ALL_LANES 0
#define HAL_AS_U32(x) __builtin_bit_cast(unsigned int, (float)(x))
#define HAL_AS_FLOAT(x) __builtin_bit_cast(float, (unsigned int)(x))
/* A product rounded for itself; stores and loads that order other memory for every device and the host. */
HAL_INLINE float hal_mul(float x, float y) {
#pragma clang fp contract(off)
  return x * y;
}
#define HAL_MUL(x, y) hal_mul(x, y)
#define HAL_STORE_RELEASE(p, x) __atomic_store_n(p, x, __ATOMIC_RELEASE)
#define HAL_LOAD_ACQUIRE(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define HAL_HALF_TO_FLOAT(bits) ((float)__builtin_bit_cast(_Float16, (unsigned short)(bits)))
#define HAL_FLOAT_TO_HALF(value) __builtin_bit_cast(unsigned short, (_Float16)(value))

/* Memory of the device by its address. */
#define HAL_AT(type, address) ((type *)(address))

#include "cxx.h"
