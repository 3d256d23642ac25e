/* CUDA C++, without headers of the toolkit: NVRTC alone suffices. */
#include "simt.h"

#define HAL_SHUFFLE_XOR(mask, value, offset, width) __shfl_xor_sync(mask, value, offset, width)
#define HAL_ALL_LANES 0xffffffffu
#define HAL_AS_U32(x) __float_as_uint(x)
#define HAL_AS_FLOAT(x) __uint_as_float(x)

/* A product rounded for itself; stores and loads that order other memory for every device and the host. */
#define HAL_MUL(x, y) __fmul_rn(x, y)
#define HAL_STORE_RELEASE(p, x) asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory")
#define HAL_LOAD_ACQUIRE(p) hal_load_acquire(p)
HAL_INLINE unsigned int hal_load_acquire(const unsigned int *p) {
  unsigned int found;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(found) : "l"(p) : "memory");
  return found;
}

/* Memory of the device by its address; the compiler is told that it is no other memory. */
#define HAL_AT(type, address) ((type *)__cvta_global_to_generic((size_t)(address)))

HAL_INLINE float hal_half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
HAL_INLINE unsigned short hal_float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#define HAL_HALF_TO_FLOAT(bits) hal_half_to_float(bits)
#define HAL_FLOAT_TO_HALF(value) hal_float_to_half(value)

#include "cxx.h"
