/* HIP C++, compiled by clang: half precision is a type of the language. */
#define HAL_INLINE __device__ static __forceinline__
#define HAL_KERNEL(threads) extern "C" __global__ __launch_bounds__(threads)
#define HAL_SHARED(type, name, count) __shared__ type name[count] __attribute__((aligned(16)))
#define HAL_UNROLL _Pragma("unroll")

#define HAL_THREAD ((int)threadIdx.x)
#define HAL_GROUP ((int)blockIdx.x)
#define HAL_GROUPS ((int)gridDim.x)
#define HAL_BARRIER() __syncthreads()
/* All lanes of a wavefront run together: there is no mask to give. */
#define HAL_SHUFFLE_XOR(mask, value, offset, width) __shfl_xor(value, offset, width)
#define HAL_ALL_LANES 0

#define HAL_EXP2(x) exp2f(x)
#define HAL_LOG2(x) log2f(x)
#define HAL_FMAX(x, y) fmaxf(x, y)
#define HAL_FMA(x, y, z) fmaf(x, y, z)
#define HAL_AS_U32(x) __builtin_bit_cast(unsigned int, (float)(x))
#define HAL_AS_FLOAT(x) __builtin_bit_cast(float, (unsigned int)(x))
#define HAL_HALF_TO_FLOAT(bits) ((float)__builtin_bit_cast(_Float16, (unsigned short)(bits)))
#define HAL_FLOAT_TO_HALF(value) __builtin_bit_cast(unsigned short, (_Float16)(value))
