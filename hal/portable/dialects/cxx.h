/* What the C++ dialects have in common: eight floats as a struct whose loops the compiler unrolls into registers. */
typedef long long hal_long;
typedef unsigned char hal_u8;
typedef unsigned short hal_u16;
typedef unsigned int hal_u32;

#define HAL_GLOBAL
#define HAL_LOCAL

struct alignas(16) hal_words {
  hal_u32 word[4];
};
#define HAL_NO_WORDS {{0, 0, 0, 0}}
struct hal_f8 {
  float at[8];
};

/* Sixteen bytes at once, so both sides are aligned to that. */
HAL_INLINE void hal_copy8(hal_u16 *to, const hal_u16 *from) { *(hal_words *)to = *(const hal_words *)from; }
HAL_INLINE void hal_copy8(float *to, const float *from) {
  ((hal_words *)to)[0] = ((const hal_words *)from)[0];
  ((hal_words *)to)[1] = ((const hal_words *)from)[1];
}
#define HAL_COPY8(to, from) hal_copy8(to, from)

HAL_INLINE hal_f8 hal_f8_float(const float *from) {
  hal_words low = ((const hal_words *)from)[0], high = ((const hal_words *)from)[1];
  hal_f8 x;
  HAL_UNROLL
  for (int i = 0; i < 4; i++) {
    x.at[i] = HAL_AS_FLOAT(low.word[i]);
    x.at[4 + i] = HAL_AS_FLOAT(high.word[i]);
  }
  return x;
}
HAL_INLINE hal_f8 hal_f8_bf16(const hal_u16 *from) {
  hal_words pairs = *(const hal_words *)from;
  hal_f8 x;
  HAL_UNROLL
  for (int i = 0; i < 4; i++) {
    x.at[2 * i] = HAL_AS_FLOAT(pairs.word[i] << 16);
    x.at[2 * i + 1] = HAL_AS_FLOAT(pairs.word[i] & 0xffff0000u);
  }
  return x;
}
#define HAL_F8_LOCAL_FLOAT(p) hal_f8_float(p)
#define HAL_F8_GLOBAL_FLOAT(p) hal_f8_float(p)
#define HAL_F8_BF16(p) hal_f8_bf16(p)
#define HAL_F8_HALF(p) hal_f8_half(p) /* kernels/elements.h, from HAL_HALF_TO_FLOAT */

HAL_INLINE void hal_f8_spread(hal_f8 x, float *array) {
  HAL_UNROLL
  for (int i = 0; i < 8; i++) array[i] = x.at[i];
}
#define HAL_F8_SPREAD(x, array) hal_f8_spread(x, array)

HAL_INLINE hal_f8 hal_f8_all(float a) {
  hal_f8 x;
  HAL_UNROLL
  for (int i = 0; i < 8; i++) x.at[i] = a;
  return x;
}
HAL_INLINE hal_f8 hal_f8_fma(hal_f8 x, hal_f8 y, hal_f8 z) {
  HAL_UNROLL
  for (int i = 0; i < 8; i++) z.at[i] = HAL_FMA(x.at[i], y.at[i], z.at[i]);
  return z;
}
HAL_INLINE hal_f8 hal_f8_scale(hal_f8 x, float a) {
  HAL_UNROLL
  for (int i = 0; i < 8; i++) x.at[i] *= a;
  return x;
}
HAL_INLINE float hal_f8_sum(hal_f8 x) {
  return ((x.at[0] + x.at[4]) + (x.at[2] + x.at[6])) + ((x.at[1] + x.at[5]) + (x.at[3] + x.at[7]));
}
#define HAL_F8_ALL(x) hal_f8_all(x)
#define HAL_F8_FMA(x, y, z) hal_f8_fma(x, y, z)
#define HAL_F8_SCALE(x, a) hal_f8_scale(x, a)
#define HAL_F8_AXPY(a, x, y) hal_f8_fma(hal_f8_all(a), x, y)
