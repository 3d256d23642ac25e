/* Join the pieces of units that have several: the groups of a unit's slots share its rows. */
HAL_KERNEL(THREADS)
void mla_merge(HAL_GLOBAL const int *lengths, HAL_GLOBAL const int *starts, HAL_GLOBAL const hal_long *plan,
               HAL_GLOBAL hal_element *out, HAL_GLOBAL float *lse, HAL_GLOBAL const float *slots,
               HAL_GLOBAL const float *states, float log_unit, int batch, int ragged, int s_q, int total_q, int group,
               int h_kv, int d_v, hal_long most_slots, hal_long out_batch, hal_long out_query, hal_long out_head,
               hal_long lse_batch, hal_long lse_head) {
  HAL_GLOBAL const hal_long *before = plan + batch + 1;
  int column = HAL_THREAD % VECTORS * 8, slice = HAL_THREAD / VECTORS;
  hal_long count = before[batch] < most_slots ? before[batch] : most_slots;

  for (hal_long x = HAL_GROUP; x < count; x += HAL_GROUPS) {
    int j = sequence_of(before, batch, x);
    hal_long number = queries_of(starts, ragged, s_q, j), tiles = tiles_of(number, group), units = tiles * h_kv;
    if (units < 1) continue;
    hal_long parts = pieces_of(blocks_of(lengths, j), plan[2 * (batch + 1) + j]);
    hal_long y = x - before[j], part = y / units, unit = y % units, first = before[j] + unit;
    if (first + (parts - 1) * units >= most_slots) continue;

    for (hal_long r = part + slice * parts; r < ROWS; r += parts * SLICES) {
      hal_long i = (unit % tiles * ROWS + r) / group, n = i + (ragged ? starts[j] : 0);
      hal_long head = unit / tiles * group + (unit % tiles * ROWS + r) % group;
      if (i >= number || n < 0 || n >= (ragged ? total_q : s_q)) continue;

      float highest = LOWEST, total = 0.0f, array[8];
      for (hal_long p = 0; p < parts; p++)
        highest = HAL_FMAX(highest, states[((first + p * units) * ROWS + r) * 2]);
      hal_f8 sum = HAL_F8_ALL(0.0f);
      for (hal_long p = 0; p < parts; p++) {
        hal_long at = (first + p * units) * ROWS + r;
        float weight = HAL_EXP2(states[at * 2] - highest);
        if (states[at * 2 + 1] == 0.0f) continue;
        total += states[at * 2 + 1] * weight;
        sum = HAL_F8_AXPY(weight, HAL_F8_GLOBAL_FLOAT(slots + at * WIDTH_V + column), sum);
      }
      HAL_F8_SPREAD(HAL_F8_SCALE(sum, 1.0f / total), array);
      hal_long to = j * out_batch + n * out_query + head * out_head + column;
      for (int k = 0; k < 8; k++)
        if (column + k < d_v) out[to + k] = hal_from_float(total == 0.0f ? 0.0f : array[k]);
      if (column == 0)
        lse[j * lse_batch + head * lse_head + n] =
            total == 0.0f ? HAL_INFINITY : (highest + HAL_LOG2(total)) * log_unit;
    }
  }
}
