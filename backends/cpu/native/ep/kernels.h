// Copy, reduce and cast: the work on token rows. Each chooses the widest instructions of the machine once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hal_ep {

enum class Type : int { bf16, f16, f32 };
inline size_t type_bytes(Type type) { return type == Type::f32 ? 4 : 2; }

// Copy bytes past the caches; end a series with fence(). Any alignment; no overlap.
void copy_streaming(void* to, const void* from, size_t bytes);
void fence();

// out[i] = round(bias0[i] + bias1[i] + sum over r of rows[r][i]), float32, in this order, starting from 0.
// With weights each row is multiplied first, product and sum rounded apart. out is of type `out_type`.
void reduce(void* out, Type out_type, const void* const* rows, const float* weights, int count, const void* bias0,
            const void* bias1, Type type, size_t columns);

// float8_e4m3fn with one scale for 128 columns. scales: float32, or exponent bytes where `ue8m0`.
void cast_fp8(uint8_t* out, void* scales, const void* row, Type type, size_t columns, bool power_of_two, bool ue8m0);

// For measurements: the name of the instruction set in use.
const char* isa();

}  // namespace hal_ep
