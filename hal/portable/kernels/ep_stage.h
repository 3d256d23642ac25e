/* Put a call's rows where peers can read them, with what goes with them: `ep_part` says where. LANES threads share a row.
 *
 * `words` is those of 16 bytes in a row, 0 where somebody else has written them. Rows that `valid` has no slot for, of
 * which there are so many for each of so many experts, are not staged: nobody reads them.
 */
#define EP_AT_ONCE 4

HAL_KERNEL(THREADS)
void ep_stage(hal_long to, HAL_GLOBAL const hal_words *x, HAL_GLOBAL const hal_u32 *scales,
              HAL_GLOBAL const hal_long *idx, HAL_GLOBAL const hal_u32 *weights, HAL_GLOBAL const int *valid,
              HAL_GLOBAL int *routes, HAL_GLOBAL hal_u32 *wrong, int rows, int words, int row, int scale, int topk,
              int weight, int experts, int slots, int valid_at, hal_long x_stride, hal_long scale_row, hal_long scale_column) {
  HAL_GLOBAL hal_words *rows_to = HAL_AT(HAL_GLOBAL hal_words, to);
  HAL_GLOBAL hal_u32 *scales_to = HAL_AT(HAL_GLOBAL hal_u32, to + ep_part(1, rows, row, scale, topk, weight));
  HAL_GLOBAL int *idx_to = HAL_AT(HAL_GLOBAL int, to + ep_part(2, rows, row, scale, topk, weight));
  HAL_GLOBAL hal_u32 *weights_to = HAL_AT(HAL_GLOBAL hal_u32, to + ep_part(3, rows, row, scale, topk, weight));
  int side_by_side = THREADS / LANES, lane = HAL_THREAD % LANES;
  for (hal_long at = (hal_long)HAL_GROUP * side_by_side + HAL_THREAD / LANES; at < rows;
       at += (hal_long)HAL_GROUPS * side_by_side) {
    if (slots && (int)(at % slots) >= valid[valid_at + at / slots]) continue;
    for (int first = lane; first < words; first += LANES * EP_AT_ONCE) {
      hal_words found[EP_AT_ONCE];
      HAL_UNROLL
      for (int i = 0; i < EP_AT_ONCE; i++)
        if (first + i * LANES < words) found[i] = x[at * x_stride + first + i * LANES];
      HAL_UNROLL
      for (int i = 0; i < EP_AT_ONCE; i++)
        if (first + i * LANES < words) rows_to[at * (row / 16) + first + i * LANES] = found[i];
    }
    if (words)
      for (int i = lane; i < scale / 4; i += LANES)
        scales_to[at * (scale / 4) + i] = scales[at * scale_row + i * scale_column];
    for (int k = lane; k < topk; k += LANES) {
      hal_long expert = idx[at * topk + k];
      int legal = expert >= -1 && expert < experts;
      if (!legal) HAL_STORE_RELEASE(wrong, 1u);
      idx_to[at * topk + k] = routes[at * topk + k] = legal ? (int)expert : -1;
    }
    for (int i = lane; i < weight / 4; i += LANES) weights_to[at * (weight / 4) + i] = weights[at * (weight / 4) + i];
  }
}

/* A combine may leave choices of its dispatch out, and not make others. */
HAL_KERNEL(THREADS)
void ep_compare(HAL_GLOBAL const hal_long *idx, HAL_GLOBAL const int *routes, HAL_GLOBAL hal_u32 *wrong, int count) {
  for (int i = HAL_GROUP * THREADS + HAL_THREAD; i < count; i += HAL_GROUPS * THREADS)
    if (idx[i] >= 0 && idx[i] != routes[i]) HAL_STORE_RELEASE(wrong, 2u);
}
