/* What the kernels need of HIP's headers, of clang's own builtins: for a clang without a ROCm installation. */
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#define threadIdx (Index{__builtin_amdgcn_workitem_id_x()})
#define blockIdx (Index{__builtin_amdgcn_workgroup_id_x()})
#define gridDim (Index{__builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x()})
struct Index {
  unsigned x;
};
#define exp2f(x) __builtin_exp2f(x)
#define log2f(x) __builtin_log2f(x)
#define fmaxf(x, y) __builtin_fmaxf(x, y)
#define fmaf(x, y, z) __builtin_fmaf(x, y, z)
__device__ inline void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
__device__ inline float __shfl_xor(float value, int mask, int) {
  int other = (int)__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)) ^ mask;
  return __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute(other * 4, __builtin_bit_cast(int, value)));
}
