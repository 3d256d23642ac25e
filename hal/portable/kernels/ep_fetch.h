/* Fetch the rows that are for this rank from where their senders have staged them, to where they belong.
 *
 * Group (s, b, i) takes the rows of rank s for bin b, this rank or one of its experts, every `slices`th of them. With a row
 * go its scales, and what it tells of itself: local experts and weights of all its choices or, by expert, its expert and
 * weight; the token's position at its sender and the first choice that led here.
 */
#define EP_AT_ONCE 8

HAL_KERNEL(THREADS)
void ep_fetch(HAL_GLOBAL const hal_long *met, HAL_GLOBAL const int *routes, HAL_GLOBAL const int *counts,
              HAL_GLOBAL const int *begins, HAL_GLOBAL const int *list, HAL_GLOBAL hal_words *recv_x,
              HAL_GLOBAL hal_u32 *recv_scales, HAL_GLOBAL hal_long *recv_idx, HAL_GLOBAL float *recv_weights,
              HAL_GLOBAL int *position, HAL_GLOBAL int *choice, int here, int ranks, int most, int topk, int local,
              int by_rank, int first, int experts, int expanded, int slices, int row, int scale, int staged_topk,
              int weight, int wants_routes, hal_long scale_group, hal_long scale_row, hal_long scale_column) {
  int own = expanded ? local : 1, bins = by_rank + experts, lane = HAL_THREAD % LANES, side_by_side = THREADS / LANES;
  if (!ep_all_met(met, ranks)) return;
  for (int turn = HAL_GROUP; turn < ranks * own * slices; turn += HAL_GROUPS) {
    int pair = turn / slices, source = pair / own, bin = pair % own;
    int count = counts[source * bins + (expanded ? by_rank + here * local - first + bin : here)];
    hal_long staged = met[source * EP_PEER + 1], rows = met[source * EP_PEER + 2];
    HAL_GLOBAL const hal_words *x = HAL_AT(HAL_GLOBAL const hal_words, staged);
    HAL_GLOBAL const hal_u32 *scales = HAL_AT(HAL_GLOBAL const hal_u32, staged + ep_part(1, rows, row, scale, staged_topk, weight));
    HAL_GLOBAL const float *weights = HAL_AT(HAL_GLOBAL const float, staged + ep_part(3, rows, row, scale, staged_topk, weight));
    HAL_GLOBAL const int *chosen = routes + source * (ep_up16((hal_long)most * topk * 4) / 4);
    for (int i = turn % slices * side_by_side + HAL_THREAD / LANES; i < count; i += slices * side_by_side) {
      hal_long token = list[(hal_long)pair * most + i], to = (hal_long)begins[pair] + i;
      if (token >= rows) continue; /* of an earlier dispatch's list, where the rank is wrong about how many it has */
      /* Asked for before the row, whose words come as late. */
      hal_u32 first_scale = lane < scale / 4 ? scales[token * (scale / 4) + lane] : 0;
      for (int at = lane; at < row / 16; at += LANES * EP_AT_ONCE) {
        hal_words found[EP_AT_ONCE];
        HAL_UNROLL
        for (int j = 0; j < EP_AT_ONCE; j++)
          if (at + j * LANES < row / 16) found[j] = x[token * (row / 16) + at + j * LANES];
        HAL_UNROLL
        for (int j = 0; j < EP_AT_ONCE; j++)
          if (at + j * LANES < row / 16) recv_x[to * (row / 16) + at + j * LANES] = found[j];
      }
      hal_long scales_at = bin * scale_group + (scale_group ? to - bin * (hal_long)ranks * most : to) * scale_row;
      for (int j = lane; j < scale / 4; j += LANES)
        recv_scales[scales_at + j * scale_column] = j == lane ? first_scale : scales[token * (scale / 4) + j];
      int hit = -1;
      if (lane == 0)
        for (int k = topk - 1; k >= 0; k--) {
          int expert = chosen[token * topk + k] - here * local, is_here = expert >= 0 && expert < local;
          if (expanded ? expert == bin : is_here) hit = k;
        }
      if (lane == 0) {
        position[to] = (int)token;
        if (wants_routes) choice[to] = hit;
      }
      if (!wants_routes) continue;
      if (expanded && lane == 0) {
        recv_idx[to] = bin;
        float sum = 0.0f;
        for (int k = 0; weight && k < topk; k++)
          if (chosen[token * topk + k] - here * local == bin) sum += weights[token * topk + k];
        if (weight) recv_weights[to] = sum;
      }
      if (!expanded)
        for (int k = lane; k < topk; k += LANES) {
          int expert = chosen[token * topk + k] - here * local, is_here = expert >= 0 && expert < local;
          recv_idx[to * topk + k] = is_here ? expert : -1;
          if (weight) recv_weights[to * topk + k] = is_here ? weights[token * topk + k] : 0.0f;
        }
    }
  }
}
