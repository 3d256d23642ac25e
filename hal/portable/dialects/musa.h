/* MUSA C++ as mcc compiles it: CUDA's words, subgroups of 128 lanes up to architecture 22 and of 32 from 31 on. */
#define HAL_INLINE __device__ static __forceinline__
#define HAL_KERNEL(threads) extern "C" __global__ __launch_bounds__(threads)
#define HAL_SHARED(type, name, count) __shared__ type name[count] __attribute__((aligned(16)))
#define HAL_UNROLL _Pragma("unroll")

#define HAL_THREAD ((int)threadIdx.x)
#define HAL_GROUP ((int)blockIdx.x)
#define HAL_GROUPS ((int)gridDim.x)
#define HAL_BARRIER() __syncthreads()
#define HAL_SHUFFLE_XOR(mask, value, offset, width) __shfl_xor_sync(mask, value, offset, width)
#define HAL_ALL_LANES 0xffffffffu

#define HAL_EXP2(x) exp2f(x)
#define HAL_LOG2(x) log2f(x)
#define HAL_FMAX(x, y) fmaxf(x, y)
#define HAL_FMA(x, y, z) fmaf(x, y, z)
#define HAL_AS_U32(x) __float_as_uint(x)
#define HAL_AS_FLOAT(x) __uint_as_float(x)
/* Half precision is converted with integers, by kernels/elements.h. */
