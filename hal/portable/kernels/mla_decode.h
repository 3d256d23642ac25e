/* Attend: one piece after the other. Compiled with
 *   ROWS      query rows of a tile                 BLOCK    tokens of a block
 *   WIDTH_K   columns of K in local memory         WIDTH_V  columns of V accumulated; multiples of 8, WIDTH_V <= WIDTH_K
 *   SLICES    of the rows, one a set of threads     GRAIN    scores a thread computes of one token at a time
 * A thread owns eight columns of the ROWS / SLICES rows of its slice: their outputs stay in its registers.
 * LANES neighbouring threads look after the maximum and the sum of one row.
 */
#define LANES 8
#define VECTORS (WIDTH_V / 8)
#define THREADS (VECTORS * SLICES)
#define EACH (ROWS / SLICES)
#define SCORES (BLOCK * (ROWS / GRAIN))
/* Eight more elements a row, so that the rows of neighbouring threads lie in different banks. */
#define PITCH (WIDTH_K + 8)
/* Stands for "nothing seen yet": finite, so that the difference of two of them is 0 and not NaN. */
#define LOWEST (-3.4e38f)

/* What the LANES threads of a row hold, joined: through registers where subgroups are wide enough, else local memory. */
#if HAL_SUBGROUP >= LANES
#define JOIN(operation, value, lanes)                                              \
  for (int offset = LANES / 2; offset > 0; offset /= 2) {                          \
    float other = HAL_SHUFFLE_XOR(HAL_ALL_LANES, value, offset, LANES);             \
    value = operation(value, other);                                               \
  }
#else
#define JOIN(operation, value, lanes)                                              \
  lanes[thread] = value;                                                           \
  HAL_BARRIER();                                                                   \
  for (int reach = LANES / 2; reach > 0; reach /= 2) {                             \
    if (lane < reach) lanes[thread] = operation(lanes[thread], lanes[thread + reach]); \
    HAL_BARRIER();                                                                 \
  }                                                                                \
  value = lanes[thread - lane];
#endif
#define ADD(x, y) ((x) + (y))

/* Eight columns of a row into local memory; columns from d on, and rows that are not there, are 0. */
HAL_INLINE void copy_columns(HAL_LOCAL hal_element *to, HAL_GLOBAL const hal_element *from, hal_long at, int column,
                             int d, int aligned) {
  if (aligned && at >= 0 && column + 8 <= d) {
    HAL_COPY8(to, from + at + column);
    return;
  }
  for (int i = 0; i < 8; i++) to[i] = at >= 0 && column + i < d ? from[at + column + i] : 0;
}

HAL_KERNEL(THREADS)
void mla_decode(HAL_GLOBAL const hal_element *q, HAL_GLOBAL const hal_element *kv, HAL_GLOBAL const int *table,
                HAL_GLOBAL const int *lengths, HAL_GLOBAL const int *starts, HAL_GLOBAL const hal_long *plan,
                HAL_GLOBAL hal_element *out, HAL_GLOBAL float *lse, HAL_GLOBAL float *slots, HAL_GLOBAL float *states,
                float scale, float log_unit, int batch, int ragged, int s_q, int total_q, int group, int h_kv, int d,
                int d_v, int page_size, int num_blocks, int max_tokens, int causal, int aligned, hal_long most_pieces,
                hal_long most_slots, hal_long q_batch, hal_long q_query, hal_long q_head, hal_long kv_block,
                hal_long kv_token, hal_long kv_head, hal_long table_row, hal_long out_batch, hal_long out_query,
                hal_long out_head, hal_long lse_batch, hal_long lse_head) {
  HAL_SHARED(hal_element, queries, ROWS *PITCH);
  HAL_SHARED(hal_element, tokens, BLOCK *PITCH);
  HAL_SHARED(float, weights, BLOCK *ROWS); /* scores, then their exponentials */
#if HAL_SUBGROUP < LANES
  HAL_SHARED(float, maxima, THREADS);
  HAL_SHARED(float, sums, THREADS);
#endif
  HAL_SHARED(float, row_max, ROWS);
  HAL_SHARED(float, row_sum, ROWS);
  HAL_SHARED(float, row_factor, ROWS);
  HAL_SHARED(int, row_query, ROWS); /* number of the query, -1 where there is no such row */
  HAL_SHARED(int, row_head, ROWS);
  HAL_SHARED(int, row_tokens, ROWS); /* how many tokens the row sees */
  HAL_SHARED(hal_long, token_at, BLOCK);

  int thread = HAL_THREAD;
  int lane = thread % LANES, row = thread / LANES, mine = row < ROWS ? BLOCK : 0;
  int column = thread % VECTORS * 8, slice = thread / VECTORS;
  int padded = (d + 7) / 8 * 8;
  hal_long pieces = plan[batch] < most_pieces ? plan[batch] : most_pieces;

  for (hal_long x = HAL_GROUP; x < pieces; x += HAL_GROUPS) {
    int j = sequence_of(plan, batch, x);
    hal_long number = queries_of(starts, ragged, s_q, j), tiles = tiles_of(number, group), units = tiles * h_kv;
    if (units < 1) continue;
    hal_long span = plan[2 * (batch + 1) + j], parts = pieces_of(blocks_of(lengths, j), span);
    hal_long y = x - plan[j], part = y / units, unit = y % units, tile = unit % tiles;
    int head = (int)(unit / tiles);
    int length = lengths[j] < max_tokens ? lengths[j] : max_tokens;

    if (thread < ROWS) {
      hal_long r = tile * ROWS + thread, i = r / group, n = i + (ragged ? starts[j] : 0);
      int there = i < number && n >= 0 && n < (ragged ? total_q : s_q);
      hal_long seen = causal ? length - number + i + 1 : length;
      row_query[thread] = there ? (int)n : -1;
      row_head[thread] = head * group + (int)(r % group);
      row_tokens[thread] = there && seen > 0 ? (int)(seen < length ? seen : length) : 0;
      row_max[thread] = LOWEST;
      row_sum[thread] = 0.0f;
    }
    HAL_BARRIER();
    hal_long last = 0;
    for (int r = 0; r < ROWS; r++) last = row_tokens[r] > last ? row_tokens[r] : last;
    hal_long block = part * span, end = (last + BLOCK - 1) / BLOCK;
    if (end > block + span) end = block + span;

    for (int item = thread; item < ROWS * (WIDTH_K / 8); item += THREADS) {
      int r = item / (WIDTH_K / 8), c = item % (WIDTH_K / 8) * 8;
      hal_long at = -1;
      if (row_query[r] >= 0) at = j * q_batch + row_query[r] * q_query + row_head[r] * q_head;
      copy_columns(queries + r * PITCH + c, q, at, c, d, aligned);
    }
    hal_f8 values[EACH];
    HAL_UNROLL
    for (int e = 0; e < EACH; e++) values[e] = HAL_F8_ALL(0.0f);

    for (; block < end; block++) {
      for (int n = thread; n < BLOCK; n += THREADS) {
        token_at[n] = -1;
        if (block * BLOCK + n < last) {
          int token = (int)block * BLOCK + n, page = table[j * table_row + token / page_size];
          if (page >= 0 && page < num_blocks)
            token_at[n] = page * kv_block + token % page_size * kv_token + head * kv_head;
        }
      }
      HAL_BARRIER();
      for (int item = thread; item < BLOCK * (WIDTH_K / 8); item += THREADS) {
        int n = item / (WIDTH_K / 8), c = item % (WIDTH_K / 8) * 8;
        copy_columns(tokens + n * PITCH + c, kv, token_at[n], c, d, aligned);
      }
      HAL_BARRIER();

      /* All threads go round equally often, those too many beside another one: not every compiler of an OpenCL for
       * processors gets a loop right that is uniform but lies within one that is not. */
      for (int base = 0; base < SCORES; base += THREADS) {
        int item = (base + thread) % SCORES, n = item % BLOCK, r = item / BLOCK * GRAIN;
        hal_f8 products[GRAIN];
        HAL_UNROLL
        for (int g = 0; g < GRAIN; g++) products[g] = HAL_F8_ALL(0.0f);
        for (int c = 0; c < padded; c += 8) {
          hal_f8 key = HAL_F8_ELEMENTS(tokens + n * PITCH + c);
          HAL_UNROLL
          for (int g = 0; g < GRAIN; g++)
            products[g] = HAL_F8_FMA(HAL_F8_ELEMENTS(queries + (r + g) * PITCH + c), key, products[g]);
        }
        HAL_UNROLL
        for (int g = 0; g < GRAIN && base + thread < SCORES; g++) {
          int seen = token_at[n] >= 0 && block * BLOCK + n < row_tokens[r + g];
          weights[n * ROWS + r + g] = seen ? hal_f8_sum(products[g]) * scale : LOWEST;
        }
      }
      HAL_BARRIER();

      float highest = LOWEST, sum = 0.0f;
      for (int n = lane; n < mine; n += LANES) highest = HAL_FMAX(highest, weights[n * ROWS + row]);
      JOIN(HAL_FMAX, highest, maxima)
      if (row < ROWS) highest = HAL_FMAX(highest, row_max[row]);
      for (int n = lane; n < mine; n += LANES) {
        float score = weights[n * ROWS + row];
        float weight = score <= LOWEST ? 0.0f : HAL_EXP2(score - highest); /* a score that is NaN stays so */
        weights[n * ROWS + row] = weight;
        sum += weight;
      }
      JOIN(ADD, sum, sums)
      if (row < ROWS && lane == 0) {
        float factor = HAL_EXP2(row_max[row] - highest);
        row_factor[row] = factor;
        row_max[row] = highest;
        row_sum[row] = row_sum[row] * factor + sum;
      }
      HAL_BARRIER();

      /* What outlives a barrier may be kept in memory by an OpenCL for processors: this does not. */
      hal_f8 totals[EACH];
      HAL_UNROLL
      for (int e = 0; e < EACH; e++) totals[e] = HAL_F8_SCALE(values[e], row_factor[slice * EACH + e]);
      for (int n = 0; n < BLOCK; n++) {
        hal_f8 value = HAL_F8_ELEMENTS(tokens + n * PITCH + column);
        HAL_UNROLL
        for (int e = 0; e < EACH; e++)
          totals[e] = HAL_F8_AXPY(weights[n * ROWS + slice * EACH + e], value, totals[e]);
      }
      HAL_UNROLL
      for (int e = 0; e < EACH; e++) values[e] = totals[e];
    }

    hal_long slot = plan[batch + 1 + j] + y;
    HAL_UNROLL
    for (int e = 0; e < EACH; e++) {
      int r = slice * EACH + e;
      float total = row_sum[r], array[8];
      if (parts > 1) {
        if (slot < most_slots) {
          HAL_F8_SPREAD(values[e], array);
          for (int i = 0; i < 8; i++) slots[(slot * ROWS + r) * WIDTH_V + column + i] = array[i];
          if (column == 0) {
            states[(slot * ROWS + r) * 2] = row_max[r];
            states[(slot * ROWS + r) * 2 + 1] = total;
          }
        }
      } else if (row_query[r] >= 0) {
        hal_long at = j * out_batch + row_query[r] * out_query + row_head[r] * out_head;
        HAL_F8_SPREAD(HAL_F8_SCALE(values[e], 1.0f / total), array);
        for (int i = 0; i < 8; i++)
          if (column + i < d_v) out[at + column + i] = hal_from_float(total == 0.0f ? 0.0f : array[i]);
        if (column == 0)
          lse[j * lse_batch + row_head[r] * lse_head + row_query[r]] =
              total == 0.0f ? HAL_INFINITY : (row_max[r] + HAL_LOG2(total)) * log_unit;
      }
    }
    HAL_BARRIER();
  }
}
