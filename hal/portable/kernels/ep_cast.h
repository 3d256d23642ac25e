/* FP8 e4m3 with a scale for every 128 columns (GROUP), there and back; by integers, since few devices have the format. */

/* Round to nearest, ties to even; beyond 448 is NaN, which stays NaN. */
HAL_INLINE hal_u8 ep_narrow(float value) {
  hal_u32 bits = HAL_AS_U32(value), sign = bits >> 24 & 0x80u, rest = bits & 0x7fffffffu;
  if (rest >= 0x43f00000u) return (hal_u8)(sign | 0x7fu);
  if (rest >= 0x3c800000u) return (hal_u8)(sign | ((rest - (120u << 23) + 0x7ffffu + (rest >> 20 & 1u)) >> 20));
  /* Below 2^-6: adding 2^14 makes float32 round to multiples of 2^-9. */
  return (hal_u8)(sign | (HAL_AS_U32(HAL_AS_FLOAT(rest) + 16384.0f) - 0x46800000u));
}

HAL_INLINE float ep_widen(hal_u8 code) {
  hal_u32 sign = (hal_u32)(code & 0x80u) << 24, rest = code & 0x7fu;
  if (rest == 0x7fu) return HAL_AS_FLOAT(sign | 0x7fc00000u);
  if (rest >= 8u) return HAL_AS_FLOAT(sign | ((rest << 20) + (120u << 23)));
  return HAL_AS_FLOAT(sign | HAL_AS_U32((float)rest * 0.001953125f));
}

/* A group takes GROUP columns of a row at a time. POWERS rounds scales up to powers of two; PACKED stores their exponents,
 * a byte each, instead of floats. */
HAL_KERNEL(GROUP)
void ep_cast(HAL_GLOBAL hal_u8 *out, HAL_GLOBAL hal_u8 *exponents, HAL_GLOBAL float *scales,
             HAL_GLOBAL const hal_element *x, int columns, int groups, int width, hal_long parts, hal_long x_stride) {
  HAL_SHARED(hal_u32, most, GROUP);
  int thread = HAL_THREAD;
  for (hal_long part = HAL_GROUP; part < parts; part += HAL_GROUPS) {
    int number = (int)(part % groups), column = number * GROUP + thread;
    hal_long row = part / groups;
    float value = column < columns ? hal_to_float(x[row * x_stride + column]) : 0.0f;

    /* Magnitudes compare as integers; a NaN is the largest and stays. */
    most[thread] = HAL_AS_U32(value) & 0x7fffffffu;
    HAL_BARRIER();
    for (int reach = GROUP / 2; reach > 0; reach /= 2) {
      if (thread < reach && most[thread + reach] > most[thread]) most[thread] = most[thread + reach];
      HAL_BARRIER();
    }
    float highest = HAL_AS_FLOAT(most[0]);
    /* All have read it before the next part is written there. */
    HAL_BARRIER();
    highest = highest < 1e-4f ? 1e-4f : highest;
    float scale = HAL_MUL(highest, 1.0f / 448.0f), inverse = 448.0f / highest;
#if POWERS
    hal_u32 bits = HAL_AS_U32(scale), exponent = (bits >> 23) + ((bits & 0x7fffffu) != 0);
    exponent = exponent > 254u ? 254u : exponent;
    scale = HAL_AS_FLOAT(exponent << 23);
    /* 2^127 has an inverse too, if a subnormal one. */
    inverse = exponent < 254u ? HAL_AS_FLOAT((254u - exponent) << 23) : HAL_AS_FLOAT(0x400000u);
#endif
    if (column < columns) out[row * columns + column] = ep_narrow(HAL_MUL(value, inverse));
#if PACKED
    /* The last word of a row has zeros where there are no groups. */
    if (thread == 0) exponents[row * width + number] = (hal_u8)exponent;
    if (number == groups - 1 && thread < width - groups) exponents[row * width + groups + thread] = 0;
#else
    if (thread == 0) scales[row * width + number] = scale;
#endif
  }
}

/* The way back, for experts that compute with elements. */
HAL_KERNEL(GROUP)
void ep_dequantise(HAL_GLOBAL hal_element *out, HAL_GLOBAL const hal_u8 *x, HAL_GLOBAL const float *scales, int columns,
                   int groups) {
  int number = HAL_GROUP % groups, column = number * GROUP + HAL_THREAD;
  hal_long row = HAL_GROUP / groups;
  if (column < columns)
    out[row * columns + column] =
        hal_from_float(HAL_MUL(ep_widen(x[row * columns + column]), scales[row * groups + number]));
}
