// Compile with -ffp-contract=off: products and sums are rounded apart, as the specification says.
#include "kernels.h"

#include <cmath>
#include <cstring>

// HAL_EP_BASELINE leaves the variants out, for builds under a sanitizer.
#if defined(__x86_64__) && !defined(HAL_EP_BASELINE)
#include "sums_x86.h"
#define HAL_X86 1
#else
#define HAL_X86 0
#endif

#define HAL_INLINE inline __attribute__((always_inline))

namespace hal_ep {
namespace {

HAL_INLINE float widen_bf16(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

HAL_INLINE uint16_t narrow_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

template <Type T>
HAL_INLINE float load(const void* at, size_t i) {
  if constexpr (T == Type::bf16) return widen_bf16(static_cast<const uint16_t*>(at)[i]);
  if constexpr (T == Type::f16) return float(static_cast<const _Float16*>(at)[i]);
  if constexpr (T == Type::f32) return static_cast<const float*>(at)[i];
}

template <Type T>
HAL_INLINE void store(void* at, size_t i, float value) {
  if constexpr (T == Type::bf16) static_cast<uint16_t*>(at)[i] = narrow_bf16(value);
  if constexpr (T == Type::f16) static_cast<_Float16*>(at)[i] = _Float16(value);
  if constexpr (T == Type::f32) static_cast<float*>(at)[i] = value;
}

// Columns are taken in blocks whose sums stay in the first-level cache (and mostly in registers).
constexpr size_t kBlock = 64;

template <Type In, Type Out>
HAL_INLINE void reduce_block(void* out, const void* const* rows, const float* weights, int count, const void* bias0,
                             const void* bias1, size_t at, size_t width) {
  float sum[kBlock] = {};
  if (bias0 != nullptr)
    for (size_t i = 0; i < width; ++i) sum[i] += load<In>(bias0, at + i);
  if (bias1 != nullptr)
    for (size_t i = 0; i < width; ++i) sum[i] += load<In>(bias1, at + i);
  for (int r = 0; r < count; ++r) {
    const void* row = rows[r];
    if (weights == nullptr) {
      for (size_t i = 0; i < width; ++i) sum[i] += load<In>(row, at + i);
    } else {
      float weight = weights[r];
      for (size_t i = 0; i < width; ++i) sum[i] += weight * load<In>(row, at + i);
    }
  }
  for (size_t i = 0; i < width; ++i) store<Out>(out, at + i, sum[i]);
}

template <Type In, Type Out>
HAL_INLINE void reduce_row(void* out, const void* const* rows, const float* weights, int count, const void* bias0,
                           const void* bias1, size_t columns) {
  size_t at = 0;
  for (; at + kBlock <= columns; at += kBlock)
    reduce_block<In, Out>(out, rows, weights, count, bias0, bias1, at, kBlock);
  if (at < columns) reduce_block<In, Out>(out, rows, weights, count, bias0, bias1, at, columns - at);
}

HAL_INLINE void reduce_any(void* out, Type out_type, const void* const* rows, const float* weights, int count,
                           const void* bias0, const void* bias1, Type type, size_t columns) {
  if (out_type == Type::f32 && type != Type::f32) {
    if (type == Type::bf16)
      reduce_row<Type::bf16, Type::f32>(out, rows, weights, count, bias0, bias1, columns);
    else
      reduce_row<Type::f16, Type::f32>(out, rows, weights, count, bias0, bias1, columns);
  } else if (type == Type::bf16) {
    reduce_row<Type::bf16, Type::bf16>(out, rows, weights, count, bias0, bias1, columns);
  } else if (type == Type::f16) {
    reduce_row<Type::f16, Type::f16>(out, rows, weights, count, bias0, bias1, columns);
  } else {
    reduce_row<Type::f32, Type::f32>(out, rows, weights, count, bias0, bias1, columns);
  }
}

// Round to nearest even; from 480 up, and for NaN, the one NaN of the format.
HAL_INLINE uint8_t narrow_fp8(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-6 the step is 2^-9: adding 2^14 leaves exactly that step in a float's mantissa.
  float shifted;
  std::memcpy(&shifted, &magnitude, 4);
  shifted += 16384.0f;
  uint32_t small;
  std::memcpy(&small, &shifted, 4);
  small -= 0x46800000u;
  uint32_t odd = (magnitude >> 20) & 1u;
  uint32_t normal = (magnitude - (120u << 23) + 0x7FFFFu + odd) >> 20;
  uint32_t result = magnitude < (121u << 23) ? small : normal;
  result = magnitude >= 0x43F00000u ? 0x7Fu : result;
  return uint8_t(result | sign);
}

template <Type T>
HAL_INLINE void cast_row(uint8_t* out, void* scales, const void* row, size_t columns, bool power_of_two, bool ue8m0) {
  constexpr float kReciprocal = 1.0f / 448.0f;
  for (size_t group = 0; group * 128 < columns; ++group) {
    size_t begin = group * 128, width = columns - begin < 128 ? columns - begin : 128;
    // Magnitudes compare as integers, which vectorises; a NaN is the largest and stays.
    uint32_t most = 0;
    for (size_t i = 0; i < width; ++i) {
      float element = load<T>(row, begin + i);
      uint32_t magnitude;
      std::memcpy(&magnitude, &element, 4);
      magnitude &= 0x7FFFFFFFu;
      most = magnitude > most ? magnitude : most;
    }
    float amax;
    std::memcpy(&amax, &most, 4);
    amax = amax < 1e-4f ? 1e-4f : amax;
    float scale = amax * kReciprocal, inverse = 448.0f / amax;
    int exponent = 0;
    if (power_of_two) {
      uint32_t bits;
      std::memcpy(&bits, &scale, 4);
      exponent = int(bits >> 23) - 127 + ((bits & 0x7FFFFFu) != 0);
      exponent = exponent > 127 ? 127 : exponent;
      uint32_t up = uint32_t(exponent + 127) << 23;
      std::memcpy(&scale, &up, 4);
      inverse = std::ldexp(1.0f, -exponent);
    }
    if (ue8m0)
      static_cast<uint8_t*>(scales)[group] = uint8_t(exponent + 127);
    else
      static_cast<float*>(scales)[group] = scale;
    for (size_t i = 0; i < width; ++i) out[begin + i] = narrow_fp8(load<T>(row, begin + i) * inverse);
  }
}

HAL_INLINE void cast_any(uint8_t* out, void* scales, const void* row, Type type, size_t columns, bool power_of_two,
                         bool ue8m0) {
  if (type == Type::bf16)
    cast_row<Type::bf16>(out, scales, row, columns, power_of_two, ue8m0);
  else if (type == Type::f16)
    cast_row<Type::f16>(out, scales, row, columns, power_of_two, ue8m0);
  else
    cast_row<Type::f32>(out, scales, row, columns, power_of_two, ue8m0);
}

using Reduce = void (*)(void*, Type, const void* const*, const float*, int, const void*, const void*, Type, size_t);
using Cast = void (*)(uint8_t*, void*, const void*, Type, size_t, bool, bool);
using Copy = void (*)(void*, const void*, size_t);

void reduce_plain(void* out, Type out_type, const void* const* rows, const float* weights, int count,
                  const void* bias0, const void* bias1, Type type, size_t columns) {
  reduce_any(out, out_type, rows, weights, count, bias0, bias1, type, columns);
}
void cast_plain(uint8_t* out, void* scales, const void* row, Type type, size_t columns, bool power_of_two,
                bool ue8m0) {
  cast_any(out, scales, row, type, columns, power_of_two, ue8m0);
}
void copy_plain(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

#if HAL_X86
HAL_AVX2 void reduce_avx2(void* out, Type out_type, const void* const* rows, const float* weights, int count,
                             const void* bias0, const void* bias1, Type type, size_t columns) {
  if (type != Type::bf16 || out_type != Type::bf16 || bias0 != nullptr || bias1 != nullptr)
    return reduce_any(out, out_type, rows, weights, count, bias0, bias1, type, columns);
  auto* sums = static_cast<uint16_t*>(out);
  for (size_t at = 0; at < columns;) {
    at = sum_pairs_avx2(sums, rows, weights, count, at, columns);
    // The rest, and a block with a NaN.
    const size_t width = columns - at < kPairBlock256 ? columns - at : kPairBlock256;
    if (width != 0) reduce_block<Type::bf16, Type::bf16>(out, rows, weights, count, nullptr, nullptr, at, width);
    at += width;
  }
}
HAL_AVX512 void reduce_avx512(void* out, Type out_type, const void* const* rows, const float* weights, int count,
                               const void* bias0, const void* bias1, Type type, size_t columns) {
  if (type != Type::bf16 || out_type != Type::bf16 || bias0 != nullptr || bias1 != nullptr)
    return reduce_any(out, out_type, rows, weights, count, bias0, bias1, type, columns);
  auto* sums = static_cast<uint16_t*>(out);
  for (size_t at = 0; at < columns;) {
    at = sum_pairs_avx512(sums, rows, weights, count, at, columns);
    // The rest, and a block with a NaN.
    const size_t width = columns - at < kPairBlock512 ? columns - at : kPairBlock512;
    if (width != 0) reduce_block<Type::bf16, Type::bf16>(out, rows, weights, count, nullptr, nullptr, at, width);
    at += width;
  }
}
HAL_AVX2 void cast_avx2(uint8_t* out, void* scales, const void* row, Type type, size_t columns, bool power_of_two,
                        bool ue8m0) {
  cast_any(out, scales, row, type, columns, power_of_two, ue8m0);
}
HAL_AVX512 void cast_avx512(uint8_t* out, void* scales, const void* row, Type type, size_t columns, bool power_of_two,
                            bool ue8m0) {
  cast_any(out, scales, row, type, columns, power_of_two, ue8m0);
}

HAL_AVX2 void copy_avx2(void* to, const void* from, size_t bytes) {
  auto* out = static_cast<uint8_t*>(to);
  auto* in = static_cast<const uint8_t*>(from);
  size_t head = (0 - reinterpret_cast<uintptr_t>(out)) & 31;
  head = head < bytes ? head : bytes;
  std::memcpy(out, in, head);
  size_t at = head;
  for (; at + 128 <= bytes; at += 128) {
    __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + at));
    __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + at + 32));
    __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + at + 64));
    __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + at + 96));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + at), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + at + 32), b);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + at + 64), c);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + at + 96), d);
  }
  std::memcpy(out + at, in + at, bytes - at);
}
HAL_AVX512 void copy_avx512(void* to, const void* from, size_t bytes) {
  auto* out = static_cast<uint8_t*>(to);
  auto* in = static_cast<const uint8_t*>(from);
  size_t head = (0 - reinterpret_cast<uintptr_t>(out)) & 63;
  head = head < bytes ? head : bytes;
  std::memcpy(out, in, head);
  size_t at = head;
  for (; at + 256 <= bytes; at += 256) {
    __m512i a = _mm512_loadu_si512(in + at), b = _mm512_loadu_si512(in + at + 64);
    __m512i c = _mm512_loadu_si512(in + at + 128), d = _mm512_loadu_si512(in + at + 192);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + at), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + at + 64), b);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + at + 128), c);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + at + 192), d);
  }
  std::memcpy(out + at, in + at, bytes - at);
}
#endif

struct Best {
  Reduce reduce = reduce_plain;
  Cast cast = cast_plain;
  Copy copy = copy_plain;
  const char* name = "baseline";
  Best() {
#if HAL_X86
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      reduce = reduce_avx512, cast = cast_avx512, copy = copy_avx512, name = "avx512";
    } else if (__builtin_cpu_supports("avx2")) {
      reduce = reduce_avx2, cast = cast_avx2, copy = copy_avx2, name = "avx2";
    }
#endif
  }
};
const Best best;

}  // namespace

void copy_streaming(void* to, const void* from, size_t bytes) { best.copy(to, from, bytes); }

void fence() {
#if HAL_X86
  _mm_sfence();  // streaming stores are not ordered by the release that follows
#endif
}

void reduce(void* out, Type out_type, const void* const* rows, const float* weights, int count, const void* bias0,
            const void* bias1, Type type, size_t columns) {
  best.reduce(out, out_type, rows, weights, count, bias0, bias1, type, columns);
}

void cast_fp8(uint8_t* out, void* scales, const void* row, Type type, size_t columns, bool power_of_two, bool ue8m0) {
  best.cast(out, scales, row, type, columns, power_of_two, ue8m0);
}

const char* isa() { return best.name; }

}  // namespace hal_ep
