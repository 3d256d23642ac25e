/* Fetch the rows of a token from where the ranks of its experts have staged them, and sum them in float32: the biases,
 * then its choices in their order. `parts` groups are a token.
 *
 * `order` has the place of each choice's row among those this rank has sent for its bin, -1 where there is none; `bases`
 * where these begin. Products are rounded before they are added, so that every device comes to the same bits. Of the
 * weights that come back with rows (`weight` bytes each) every column is summed; with `expanded` a row has one, which all
 * choices of its expert get.
 */
#define EP_AT_ONCE 8
#if ELEMENT == FLOAT32
#define EP_PER 4
#define EP_ELEMENT(words, i) HAL_AS_FLOAT((words).word[i])
#define EP_PUT(words, i, value) (words).word[i] = HAL_AS_U32(value)
#else
#define EP_PER 8
#define EP_ELEMENT(words, i) ((hal_element)((words).word[(i) / 2] >> (i) % 2 * 16))
#define EP_PUT(words, i, value) (words).word[(i) / 2] |= (hal_u32)hal_from_float(value) << (i) % 2 * 16
#endif

HAL_KERNEL(THREADS)
void ep_gather(HAL_GLOBAL const hal_long *met, HAL_GLOBAL hal_element *out, HAL_GLOBAL float *sums,
               HAL_GLOBAL const int *routes, HAL_GLOBAL const int *order, HAL_GLOBAL const int *bases,
               HAL_GLOBAL const hal_long *idx, HAL_GLOBAL const float *weights, HAL_GLOBAL const hal_element *bias0,
               HAL_GLOBAL const hal_element *bias1, int ranks, int tokens, int topk, int local, int expanded,
               int parts, int columns, int weight, int biases, int weighted, int masked, int aligned, hal_long out_stride, hal_long bias0_stride,
               hal_long bias1_stride) {
  HAL_SHARED(hal_long, from, MOST_CHOICES);
  HAL_SHARED(float, factor, MOST_CHOICES);
  HAL_SHARED(hal_long, back, MOST_CHOICES);
  if (!ep_all_met(met, ranks)) return;
  int thread = HAL_THREAD, row = columns * (int)sizeof(hal_element);
  for (hal_long turn = HAL_GROUP; turn < (hal_long)tokens * parts; turn += HAL_GROUPS) {
    hal_long token = turn / parts;
    int part = (int)(turn % parts);
    for (int k = thread; k < topk; k += THREADS) {
      hal_long at = token * topk + k;
      int place = order[at], expert = routes[at];
      from[k] = back[k] = 0;
      if (place >= 0 && expert >= 0 && !(masked && idx[at] < 0)) {
        int rank = expert / local;
        hal_long line = bases[expanded ? expert : rank] + place, rows = met[rank * EP_PEER + 2];
        if (line < rows) {
          from[k] = met[rank * EP_PEER + 1] + line * row;
          back[k] = met[rank * EP_PEER + 1] + ep_part(3, rows, row, 0, 0, weight) + line * weight;
        }
      }
      factor[k] = weighted ? weights[at] : 1.0f;
    }
    HAL_BARRIER();
    for (int column = (part * THREADS + thread) * EP_PER; column < columns; column += parts * THREADS * EP_PER) {
      float sum[EP_PER];
      HAL_UNROLL
      for (int i = 0; i < EP_PER; i++) {
        sum[i] = 0.0f;
        if (biases > 0) sum[i] += hal_to_float(bias0[token * bias0_stride + column + i]);
        if (biases > 1) sum[i] += hal_to_float(bias1[token * bias1_stride + column + i]);
      }
      for (int k = 0; k < topk; k += EP_AT_ONCE) {
        hal_words found[EP_AT_ONCE];
        HAL_UNROLL
        for (int j = 0; j < EP_AT_ONCE; j++)
          if (k + j < topk && from[k + j])
            found[j] = *HAL_AT(HAL_GLOBAL const hal_words, from[k + j] + column * (int)sizeof(hal_element));
        HAL_UNROLL
        for (int j = 0; j < EP_AT_ONCE; j++)
          if (k + j < topk && from[k + j]) {
            HAL_UNROLL
            for (int i = 0; i < EP_PER; i++) {
              float value = hal_to_float(EP_ELEMENT(found[j], i));
              sum[i] += weighted ? HAL_MUL(value, factor[k + j]) : value;
            }
          }
      }
      if (aligned) {
        hal_words whole = HAL_NO_WORDS;
        HAL_UNROLL
        for (int i = 0; i < EP_PER; i++) EP_PUT(whole, i, sum[i]);
        *(HAL_GLOBAL hal_words *)(out + token * out_stride + column) = whole;
      } else {
        HAL_UNROLL
        for (int i = 0; i < EP_PER; i++) out[token * out_stride + column + i] = hal_from_float(sum[i]);
      }
    }
    if (weight && part == 0)
      for (int k = thread; k < topk; k += THREADS) {
        float total = 0.0f;
        int expert = routes[token * topk + k];
        for (int j = 0; j < topk; j++) {
          if (!back[j]) continue;
          HAL_GLOBAL const float *came = HAL_AT(HAL_GLOBAL const float, back[j]);
          if (!expanded) total += came[k];
          else if (expert >= 0 && routes[token * topk + j] == expert) total += came[0];
        }
        sums[token * topk + k] = total;
      }
    HAL_BARRIER();
  }
}
