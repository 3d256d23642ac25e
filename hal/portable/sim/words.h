/* The words of the C++ dialects that kernels are written with, on the host; read before the source of a module. */
#include "engine.h"

extern "C" __attribute__((visibility("default"))) const hal_sim_engine *hal_sim;
const hal_sim_engine *hal_sim;
/* What the engine does is no access of the kernel. */
#ifdef __clang__
#define HAL_SIM_UNSEEN __attribute__((disable_sanitizer_instrumentation))
#else
#define HAL_SIM_UNSEEN __attribute__((no_sanitize("thread")))
#endif
HAL_SIM_UNSEEN static inline unsigned hal_sim_at(int which) { return hal_sim->index(which); }
HAL_SIM_UNSEEN static inline void hal_sim_barrier(const char *file, int line, int place) { hal_sim->barrier(file, line, place); }
/* Where a call is, and a number for those of one line. */
#define HAL_SIM_HERE __FILE__, __LINE__, __COUNTER__

#ifdef HAL_SIM_SCAN
#ifdef __clang__
HAL_SIM_BY_CLANG
#endif
#define __global__ HAL_SIM_KERNEL
#else
#define __global__ __attribute__((visibility("default")))
#endif
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __constant__ const
/* One copy a thread of the host, each of which runs one group at a time. Nothing lies beside an array but a gap. */
#define HAL_SIM_PASTE(a, b) a##b
#define HAL_SIM_GAP(n) HAL_SIM_PASTE(hal_sim_gap_, n)
#ifdef HAL_SIM_CHECKED
#define __shared__                                                                              \
  static thread_local char HAL_SIM_GAP(__COUNTER__)[4096] __attribute__((used, aligned(16)));    \
  static thread_local
#else
#define __shared__ static thread_local
#endif

struct hal_sim_index {
  unsigned x, y, z;
};
#define threadIdx (hal_sim_index{hal_sim_at(0), 0, 0})
#define blockIdx (hal_sim_index{hal_sim_at(1), 0, 0})
#define gridDim (hal_sim_index{hal_sim_at(2), 1, 1})
#define blockDim (hal_sim_index{hal_sim_at(3), 1, 1})
#define warpSize ((int)hal_sim_at(4))

#define __syncthreads() hal_sim_barrier(HAL_SIM_HERE)
/* One for the device alone, which orders nothing for other processes. */
HAL_SIM_UNSEEN static inline void hal_sim_fence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#ifdef HAL_SIM_CHECKED
  hal_sim->fence(HAL_SIM_DEVICE);
#endif
}
#define __threadfence() hal_sim_fence()
#define __threadfence_block() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define __threadfence_system() __atomic_thread_fence(__ATOMIC_SEQ_CST)

template <class T>
HAL_SIM_UNSEEN static inline T hal_sim_shuffle(T value, int how, int operand, int width, const char *file, int line, int place) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = hal_sim->shuffle(bits, how, operand, width, file, line, place);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
#define __shfl_xor(value, mask, width) hal_sim_shuffle(value, HAL_SIM_XOR, mask, width, HAL_SIM_HERE)
#define __shfl_down(value, by, width) hal_sim_shuffle(value, HAL_SIM_DOWN, by, width, HAL_SIM_HERE)
#define __shfl_up(value, by, width) hal_sim_shuffle(value, HAL_SIM_UP, by, width, HAL_SIM_HERE)
#define __shfl(value, lane, width) hal_sim_shuffle(value, HAL_SIM_LANE, lane, width, HAL_SIM_HERE)
#define __shfl_xor_sync(lanes, value, mask, width) __shfl_xor(value, mask, width)
#define __shfl_down_sync(lanes, value, by, width) __shfl_down(value, by, width)
#define __shfl_up_sync(lanes, value, by, width) __shfl_up(value, by, width)
#define __shfl_sync(lanes, value, lane, width) __shfl(value, lane, width)

#define atomicAdd(address, value) __atomic_fetch_add(address, value, __ATOMIC_RELAXED)
#define atomicExch(address, value) __atomic_exchange_n(address, value, __ATOMIC_RELAXED)

#define exp2f(x) __builtin_exp2f(x)
#define log2f(x) __builtin_log2f(x)
#define fmaxf(x, y) __builtin_fmaxf(x, y)
#define fminf(x, y) __builtin_fminf(x, y)
#define fmaf(x, y, z) __builtin_fmaf(x, y, z)
#define sqrtf(x) __builtin_sqrtf(x)
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
static inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }

/* Half precision, which not every compiler for the host has in C++. */
struct hal_sim_half {
  unsigned short bits;
  hal_sim_half() = default;
  explicit hal_sim_half(float value) {
    unsigned x = __builtin_bit_cast(unsigned, value), sign = x >> 16 & 0x8000u, rest = x & 0x7fffffffu;
    if (rest > 0x7f800000u)
      bits = (unsigned short)(sign | 0x7e00u);
    else if (rest >= 0x477ff000u) /* from half way between 65504 and 65536 on */
      bits = (unsigned short)(sign | 0x7c00u);
    else if (rest >= 0x38800000u)
      bits = (unsigned short)(sign | (((rest + 0xfffu + (rest >> 13 & 1u)) >> 13) - 0x1c000u));
    else /* adding 0.5 rounds to multiples of 2^-24 */
      bits = (unsigned short)(sign | (__builtin_bit_cast(unsigned, __builtin_bit_cast(float, rest) + 0.5f) - 0x3f000000u));
  }
  explicit operator float() const {
#ifdef __F16C__
    typedef short eight __attribute__((vector_size(16)));
    return __builtin_ia32_vcvtph2ps(eight{(short)bits})[0];
#else
    unsigned rest = bits & 0x7fffu, shifted = rest << 13;
    float small = __builtin_bit_cast(float, shifted + (113u << 23)) - __builtin_bit_cast(float, 113u << 23);
    unsigned normal = shifted + ((rest >= 0x7c00u ? 224u : 112u) << 23);
    unsigned magnitude = rest < 0x400u ? __builtin_bit_cast(unsigned, small) : normal;
    return __builtin_bit_cast(float, magnitude | (unsigned)(bits & 0x8000u) << 16);
#endif
  }
};
#define _Float16 hal_sim_half
