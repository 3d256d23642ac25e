// Eight tiles of 16 rows of 64 bytes, and the product of two of bfloat16 added to one of float32: the processor's (AMX),
// or plain loops that round as it does, so that what is written with tiles can be executed where it has none.
//
// The macros' tile numbers must be literals.
#pragma once

#include <string.h>

#include "problem.h"

#ifndef HAL_CPU_EMULATED_TILES
#include <immintrin.h>

// What goes between stores and loads of the same memory by tiles, of which the compiler may know nothing.
#define HAL_TILES_SEE_MEMORY() __asm__ volatile("" ::: "memory")
#define HAL_TILE_ZERO(tile) _tile_zero(tile)
#define HAL_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define HAL_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define HAL_TILE_ADD_PRODUCT(sum, a, b) _tile_dpbf16ps(sum, a, b)

namespace hal_cpu {
namespace {

// The calling thread's tiles, all whole; their registers are given back at the end, since while they are in use every
// change of threads has to save them.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    HAL_TILES_SEE_MEMORY();
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace hal_cpu

#else

#define HAL_TILES_SEE_MEMORY() ((void)0)
#define HAL_TILE_ZERO(tile) tiles.zero(tile)
#define HAL_TILE_LOAD(tile, from, stride) tiles.load(tile, from, stride)
#define HAL_TILE_STORE(tile, to, stride) tiles.store(tile, to, stride)
#define HAL_TILE_ADD_PRODUCT(sum, a, b) tiles.add_product(sum, a, b)

namespace hal_cpu {
namespace {

class Tiles {
 public:
  Tiles() { memset(words_, 0xff, sizeof words_); }  // what was never set is not a number
  void zero(int tile) { memset(words_[tile], 0, sizeof words_[tile]); }
  void load(int tile, const void* from, ptrdiff_t stride) {
    for (int m = 0; m < 16; ++m) memcpy(words_[tile][m], (const char*)from + m * stride, 64);
  }
  void store(int tile, void* to, ptrdiff_t stride) const {
    for (int m = 0; m < 16; ++m) memcpy((char*)to + m * stride, words_[tile][m], 64);
  }
  // The processor adds even and odd elements apart, takes subnormal numbers for zero, and leaves none.
  void add_product(int sum, int a, int b) {
    for (int m = 0; m < 16; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < 16; ++k) {
        const uint32_t x = words_[a][m][k];
        for (int n = 0; n < 16; ++n) {
          const uint32_t y = words_[b][k][n];
          even[n] = normal(__builtin_fmaf(wide(x << 16), wide(y << 16), even[n]));
          odd[n] = normal(__builtin_fmaf(wide(x & 0xffff0000), wide(y & 0xffff0000), odd[n]));
        }
      }
      for (int n = 0; n < 16; ++n) {
        float total;
        memcpy(&total, &words_[sum][m][n], 4);
        total = normal(normal(total) + normal(even[n] + odd[n]));
        memcpy(&words_[sum][m][n], &total, 4);
      }
    }
  }

 private:
  static float normal(float x) { return x > -0x1p-126f && x < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
  static float wide(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return normal(x);
  }
  uint32_t words_[8][16][16];
};

}  // namespace
}  // namespace hal_cpu
#endif
