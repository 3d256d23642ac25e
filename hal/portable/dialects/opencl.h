/* OpenCL C 1.2. Its vector types do what dialects/cxx.h does for C++. */
typedef long hal_long;
typedef uchar hal_u8;
typedef ushort hal_u16;
typedef uint hal_u32;
typedef uint4 hal_words;
typedef float8 hal_f8;
#define HAL_NO_WORDS ((uint4)(0))

#define HAL_KERNEL(threads) __kernel __attribute__((reqd_work_group_size(threads, 1, 1)))
#define HAL_INLINE static inline
#define HAL_GLOBAL __global
#define HAL_LOCAL __local
#define HAL_SHARED(type, name, count) __local type name[count] __attribute__((aligned(32)))
#define HAL_UNROLL _Pragma("unroll")

#define HAL_THREAD ((int)get_local_id(0))
#define HAL_GROUP ((int)get_group_id(0))
#define HAL_GROUPS ((int)get_num_groups(0))
#define HAL_BARRIER() barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE)
/* OpenCL C 1.2 has no subgroups: HAL_SUBGROUP is 1, and what would be shuffled goes through local memory. */

#define HAL_EXP2(x) exp2(x)
#define HAL_LOG2(x) log2(x)
#define HAL_FMAX(x, y) fmax(x, y)
/* A product rounded for itself, whatever is done with it. */
#define HAL_MUL(x, y) hal_mul(x, y)
HAL_INLINE float hal_mul(float x, float y) {
#pragma OPENCL FP_CONTRACT OFF
  return x * y;
}
/* OpenCL C 1.2 promises other processes nothing. Where device and host share memory its atomics are the processor's. */
#define HAL_STORE_RELEASE(p, x) (mem_fence(CLK_GLOBAL_MEM_FENCE), (void)atomic_xchg(p, x))
#define HAL_LOAD_ACQUIRE(p) hal_load_acquire(p)
HAL_INLINE uint hal_load_acquire(volatile __global uint *p) {
  uint found = atomic_or(p, 0u);
  mem_fence(CLK_GLOBAL_MEM_FENCE);
  return found;
}
#define HAL_AS_U32(x) as_uint(x)
#define HAL_AS_FLOAT(x) as_float(x)

/* Eight elements at once, by the language's own operators: compilers may leave calls of built-in functions as they are.
 * Sixteen bytes are aligned to that in global memory, rows of local memory to 32. */
#define HAL_COPY8(to, from)                                                        \
  do {                                                                             \
    ((HAL_LOCAL uint4 *)(to))[0] = ((HAL_GLOBAL const uint4 *)(from))[0];           \
    if (sizeof(*(to)) == 4) ((HAL_LOCAL uint4 *)(to))[1] = ((HAL_GLOBAL const uint4 *)(from))[1]; \
  } while (0)
#define HAL_F8_LOCAL_FLOAT(p) (*(HAL_LOCAL const float8 *)(p))
#define HAL_F8_GLOBAL_FLOAT(p) (*(HAL_GLOBAL const float8 *)(p))
#define HAL_F8_BF16(p) as_float8(convert_uint8(*(HAL_LOCAL const ushort8 *)(p)) << 16)
#define HAL_F8_HALF(p) hal_f8_half(convert_uint8(*(HAL_LOCAL const ushort8 *)(p)))
#define HAL_F8_SPREAD(x, array) vstore8(x, 0, array)
#define HAL_F8_ALL(x) ((float8)(x))
#define HAL_F8_FMA(x, y, z) ((x) * (y) + (z))
#define HAL_F8_SCALE(x, a) ((x) * (a))
#define HAL_F8_AXPY(a, x, y) ((a) * (x) + (y))

/* As hal_widen in kernels/elements.h; reading halves by vload_half is a call. Subnormals take the detour of a number of
 * the least normal exponent, which is subtracted again. */
HAL_INLINE hal_f8 hal_f8_half(uint8 bits) {
  uint8 rest = bits & 0x7fffu, shifted = rest << 13;
  uint8 normal = shifted + (112u << 23), special = as_uint8(rest >= 0x7c00u) & 0x7f800000u;
  uint8 small = as_uint8(as_float8(shifted + (113u << 23)) - as_float(113u << 23));
  return as_float8((rest < 0x400u ? small : normal) | special | (bits & 0x8000u) << 16);
}

HAL_INLINE float hal_f8_sum(hal_f8 x) {
  float4 fours = x.lo + x.hi;
  float2 twos = fours.lo + fours.hi;
  return twos.lo + twos.hi;
}
