/* A group waits for a rank, or one after the other, but no more than `turns` looks, so that it ends whatever becomes of the rank.
 *
 * What it finds is written to `told`, where the host looks: at last the call's number, so that it is complete by then.
 * In a graph only what is wrong is written, since the host looks for it after any number of replays.
 * With `topk` it fetches the rank's routes, since everybody counts them.
 */
HAL_KERNEL(THREADS)
void ep_await_all(HAL_GLOBAL const hal_long *boards, HAL_GLOBAL const hal_long *windows, HAL_GLOBAL hal_long *met,
                  HAL_GLOBAL int *routes, HAL_GLOBAL hal_u32 *told, HAL_GLOBAL const hal_u32 *epoch, int slot,
                  int here, int ranks, int call, int turns, int known, int most, int row, int scale, int topk, int weight) {
  HAL_SHARED(int, outcome, 1);
  int thread = HAL_THREAD;
  int sticks = epoch != 0;
  call = ep_round(epoch, call);
  HAL_GLOBAL hal_u32 *board = HAL_AT(HAL_GLOBAL hal_u32, boards[here]), *mine = board + ep_head(slot, ranks, here);
  for (int peer = HAL_GROUP; peer < ranks; peer += HAL_GROUPS) {
    HAL_GLOBAL hal_u32 *head = board + ep_head(slot, ranks, peer);
    if (thread == 0) {
      int there = 0;
      for (int turn = 0; turn < turns && !there; turn++)
        there = HAL_LOAD_ACQUIRE(head) == (hal_u32)call && HAL_LOAD_ACQUIRE(mine) == (hal_u32)call;
      int found = there ? EP_MET : EP_LATE, count = 0;
      hal_long at = 0;
      if (there) {
        int agreed = head[EP_WRONG] == 0 && mine[EP_WRONG] == 0 && head[EP_KIND] == mine[EP_KIND];
        for (int i = EP_FIELDS; i < EP_FIELDS + EP_AGREE; i++) agreed &= head[i] == mine[i];
        count = (int)head[EP_COUNT];
        int window = (int)head[EP_WINDOW], listed = window >= 0 && window < known;
        hal_long entry = ((hal_long)peer * known + window) * 2;
        if (!agreed)
          found = EP_DIFFERS;
        else if (count && (!listed || !windows[entry]))
          found = EP_UNKNOWN;
        else if (count && (count < 0 || count > most || ep_part(4, count, row, scale, topk, weight) > windows[entry + 1]))
          found = EP_OUTSIDE;
        else if (count)
          at = windows[entry];
        for (int i = 0; i < EP_HEAD && !sticks; i++) told[ranks * 2 + peer * EP_HEAD + i] = head[i];
      }
      met[peer * EP_PEER] = found;
      met[peer * EP_PEER + 1] = at;
      met[peer * EP_PEER + 2] = count;
      if (!sticks || found != EP_MET) told[ranks + peer] = (hal_u32)found;
      outcome[0] = found;
    }
    HAL_BARRIER();
    for (int i = thread; i < RING; i += THREADS)
      told[ranks * (2 + EP_HEAD) + i * ranks + peer] = HAL_LOAD_ACQUIRE(board + ep_read(i, ranks, peer));
    if (outcome[0] == EP_MET && topk) {
      hal_long count = met[peer * EP_PEER + 2], numbers = count * topk, each = ep_up16((hal_long)most * topk * 4);
      hal_long at = met[peer * EP_PEER + 1] + ep_part(2, count, row, scale, topk, weight);
      HAL_GLOBAL const hal_words *from = HAL_AT(HAL_GLOBAL const hal_words, at);
      HAL_GLOBAL hal_words *to = (HAL_GLOBAL hal_words *)routes + peer * (each / 16);
      /* The last word may have less: what is beyond lies within both. */
      int words = (int)((numbers + 3) / 4);
      for (int first = thread; first < words; first += THREADS * 4) {
        hal_words found[4];
        HAL_UNROLL
        for (int i = 0; i < 4; i++)
          if (first + i * THREADS < words) found[i] = from[first + i * THREADS];
        HAL_UNROLL
        for (int i = 0; i < 4; i++)
          if (first + i * THREADS < words) to[first + i * THREADS] = found[i];
      }
    }
    HAL_BARRIER();
    if (thread == 0) HAL_STORE_RELEASE(told + peer, (hal_u32)call);
  }
}
