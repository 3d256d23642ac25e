/* Sum the rows of a token in float32: the biases, then its choices in their order. A group is a token.
 *
 * `table` has a row for every choice; those whose `place` is -1 have none. Products are rounded before they are added,
 * so that every device comes to the same bits. PARTIAL leaves the sum in float32.
 */
#if PARTIAL
typedef float ep_sum;
#define EP_SUM(x) (x)
#else
typedef hal_element ep_sum;
#define EP_SUM(x) hal_from_float(x)
#endif

HAL_KERNEL(THREADS)
void ep_reduce(HAL_GLOBAL ep_sum *out, HAL_GLOBAL const hal_element *table, HAL_GLOBAL const int *place,
               HAL_GLOBAL const float *weights, HAL_GLOBAL const hal_element *bias0, HAL_GLOBAL const hal_element *bias1,
               int tokens, int topk, int columns, int biases, int weighted, hal_long out_stride, hal_long bias0_stride,
               hal_long bias1_stride) {
  for (hal_long token = HAL_GROUP; token < tokens; token += HAL_GROUPS)
    for (int column = HAL_THREAD; column < columns; column += THREADS) {
      float sum = 0.0f;
      if (biases > 0) sum += hal_to_float(bias0[token * bias0_stride + column]);
      if (biases > 1) sum += hal_to_float(bias1[token * bias1_stride + column]);
      for (hal_long k = token * topk; k < (token + 1) * topk; k++) {
        if (place[k] < 0) continue;
        float value = hal_to_float(table[k * columns + column]);
        sum += weighted ? HAL_MUL(value, weights[k]) : value;
      }
      out[token * out_stride + column] = EP_SUM(sum);
    }
}
