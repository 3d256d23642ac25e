/* Choose the spans and sum up pieces and slots, in one work group of SCAN threads. */

/* In place: sums[i] becomes the sum of sums[0 ... i]. */
HAL_INLINE void scan(HAL_LOCAL hal_long *sums, int thread) {
  for (int reach = 1; reach < SCAN; reach *= 2) {
    hal_long before = thread >= reach ? sums[thread - reach] : 0;
    HAL_BARRIER();
    sums[thread] += before;
    HAL_BARRIER();
  }
}

HAL_KERNEL(SCAN)
void mla_schedule(HAL_GLOBAL const int *lengths, HAL_GLOBAL const int *starts, HAL_GLOBAL hal_long *plan, int batch,
                  int ragged, int s_q, int group, int h_kv, int parts, int chunks, int least) {
  HAL_SHARED(hal_long, pieces, SCAN);
  HAL_SHARED(hal_long, slots, SCAN);
  int thread = HAL_THREAD;

  hal_long work = 0;
  for (int j = thread; j < batch; j += SCAN)
    work += tiles_of(queries_of(starts, ragged, s_q, j), group) * h_kv * blocks_of(lengths, j);
  pieces[thread] = work;
  HAL_BARRIER();
  scan(pieces, thread);
  hal_long common = (pieces[SCAN - 1] + parts - 1) / parts;
  HAL_BARRIER();

  hal_long pieces_before = 0, slots_before = 0;
  for (int base = 0; base < batch; base += SCAN) {
    int j = base + thread;
    hal_long count = 0, span = common;
    if (j < batch) {
      hal_long units = tiles_of(queries_of(starts, ragged, s_q, j), group) * h_kv, blocks = blocks_of(lengths, j);
      if (chunks) {
        hal_long room = units > 0 ? chunks / units : 1;
        span = room > 1 ? (blocks + room - 1) / room : blocks;
      }
      if (span < least) span = least;
      count = pieces_of(blocks, span);
      pieces[thread] = units * count;
      slots[thread] = count > 1 ? units * count : 0;
    } else {
      pieces[thread] = 0;
      slots[thread] = 0;
    }
    HAL_BARRIER();
    scan(pieces, thread);
    scan(slots, thread);
    if (j < batch) {
      plan[1 + j] = pieces_before + pieces[thread];
      plan[batch + 2 + j] = slots_before + slots[thread];
      plan[2 * (batch + 1) + j] = span;
    }
    pieces_before += pieces[SCAN - 1];
    slots_before += slots[SCAN - 1];
    HAL_BARRIER();
  }
  if (thread == 0) {
    plan[0] = 0;
    plan[batch + 1] = 0;
  }
}
