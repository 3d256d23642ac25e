/* What CUDA's language and those made after it have in common; each has a header of its own for the rest. */
#define HAL_INLINE __device__ static __forceinline__
#define HAL_KERNEL(threads) extern "C" __global__ __launch_bounds__(threads)
#define HAL_SHARED(type, name, count) __shared__ type name[count] __attribute__((aligned(16)))
#define HAL_UNROLL _Pragma("unroll")

#define HAL_THREAD ((int)threadIdx.x)
#define HAL_GROUP ((int)blockIdx.x)
#define HAL_GROUPS ((int)gridDim.x)
#define HAL_BARRIER() __syncthreads()

#define HAL_EXP2(x) exp2f(x)
#define HAL_LOG2(x) log2f(x)
#define HAL_FMAX(x, y) fmaxf(x, y)
#define HAL_FMA(x, y, z) fmaf(x, y, z)
