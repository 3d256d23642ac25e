/* Elements of tensors: stored as they are, computed with in float32. ELEMENT is FLOAT32, BF16 or HALF. */
#define FLOAT32 0
#define BF16 1
#define HALF 2

#define HAL_INFINITY HAL_AS_FLOAT(0x7f800000u)

#if ELEMENT == FLOAT32
typedef float hal_element;
#else
typedef hal_u16 hal_element;
#endif

#ifndef HAL_HALF_TO_FLOAT
#define HAL_HALF_TO_FLOAT(bits) hal_widen(bits)
HAL_INLINE float hal_widen(hal_u16 bits) {
  hal_u32 sign = (hal_u32)(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return HAL_AS_FLOAT(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return HAL_AS_FLOAT(sign | ((rest << 13) + (112u << 23)));
  /* Subnormal: so many times 2^-24, exact in float32. */
  return HAL_AS_FLOAT(sign | HAL_AS_U32((float)rest * 5.9604644775390625e-8f));
}
#endif

#ifndef HAL_FLOAT_TO_HALF
#define HAL_FLOAT_TO_HALF(value) hal_narrow(value)
HAL_INLINE hal_u16 hal_narrow(float value) {
  hal_u32 bits = HAL_AS_U32(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return (hal_u16)(sign | 0x7e00u);
  /* From half way between 65504 and 65536 on. */
  if (rest >= 0x477ff000u) return (hal_u16)(sign | 0x7c00u);
  if (rest >= 0x38800000u) return (hal_u16)(sign | (((rest + 0xfffu + (rest >> 13 & 1u)) >> 13) - 0x1c000u));
  /* Below 2^-14: adding 0.5 makes float32 round to multiples of 2^-24. */
  return (hal_u16)(sign | (HAL_AS_U32(HAL_AS_FLOAT(rest) + 0.5f) - 0x3f000000u));
}
#endif

/* Round to nearest, ties to even; NaN stays NaN whatever its payload. */
HAL_INLINE hal_u16 hal_to_bf16(float value) {
  hal_u32 bits = HAL_AS_U32(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (hal_u16)(bits >> 16 | 0x40u);
  return (hal_u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

HAL_INLINE float hal_to_float(hal_element value) {
#if ELEMENT == FLOAT32
  return value;
#elif ELEMENT == BF16
  return HAL_AS_FLOAT((hal_u32)value << 16);
#else
  return HAL_HALF_TO_FLOAT(value);
#endif
}

HAL_INLINE hal_element hal_from_float(float value) {
#if ELEMENT == FLOAT32
  return value;
#elif ELEMENT == BF16
  return hal_to_bf16(value);
#else
  return HAL_FLOAT_TO_HALF(value);
#endif
}

/* Eight elements of local memory as floats. */
#if ELEMENT == FLOAT32
#define HAL_F8_ELEMENTS(p) HAL_F8_LOCAL_FLOAT(p)
#elif ELEMENT == BF16
#define HAL_F8_ELEMENTS(p) HAL_F8_BF16(p)
#else
#ifdef __cplusplus
HAL_INLINE hal_f8 hal_f8_half(HAL_LOCAL const hal_u16 *from) {
  hal_f8 x;
  HAL_UNROLL
  for (int i = 0; i < 8; i++) x.at[i] = HAL_HALF_TO_FLOAT(from[i]);
  return x;
}
#endif
#define HAL_F8_ELEMENTS(p) HAL_F8_HALF(p)
#endif
