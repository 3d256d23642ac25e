/* After everything that the queue was given before: tell every rank of a call; and that its rows were read. */
HAL_KERNEL(THREADS)
void ep_announce(HAL_GLOBAL const hal_long *boards, HAL_GLOBAL hal_u32 *wrong, HAL_GLOBAL const hal_u32 *epoch, int slot,
                 int here, int ranks, int call, int kind, int window, int count, int a, int b, int c, int d, int e, int f, int g, int h, int i) {
  int fields[EP_AGREE] = {a, b, c, d, e, f, g, h, i};
  hal_u32 found = HAL_LOAD_ACQUIRE(wrong);
  HAL_BARRIER();
  /* The next call finds it as it was. */
  if (HAL_THREAD == 0) HAL_STORE_RELEASE(wrong, 0u);
  for (int peer = HAL_THREAD; peer < ranks; peer += THREADS) {
    HAL_GLOBAL hal_u32 *head = HAL_AT(HAL_GLOBAL hal_u32, boards[peer]) + ep_head(slot, ranks, here);
    head[EP_KIND] = (hal_u32)kind;
    head[EP_WRONG] = found;
    head[EP_WINDOW] = (hal_u32)window;
    head[EP_COUNT] = (hal_u32)count;
    for (int at = 0; at < EP_AGREE; at++) head[EP_FIELDS + at] = (hal_u32)fields[at];
    HAL_STORE_RELEASE(head, (hal_u32)ep_round(epoch, call));
  }
}

/* Unless the ranks have not met; with `whatever` even then. */
HAL_KERNEL(THREADS)
void ep_done(HAL_GLOBAL const hal_long *boards, HAL_GLOBAL const hal_long *met, HAL_GLOBAL const hal_u32 *epoch, int slot,
             int here, int ranks, int call, int whatever) {
  if (!whatever && !ep_all_met(met, ranks)) return;
  for (int peer = HAL_THREAD; peer < ranks; peer += THREADS)
    HAL_STORE_RELEASE(HAL_AT(HAL_GLOBAL hal_u32, boards[peer]) + ep_read(slot, ranks, here),
                      (hal_u32)ep_round(epoch, call));
}

/* Begin another round of a place that captured calls share: once all ranks have read what was staged in the last one, or
 * after so many turns, since a rank that is gone reads no more. */
HAL_KERNEL(THREADS)
void ep_turn(HAL_GLOBAL const hal_long *boards, HAL_GLOBAL hal_u32 *epoch, int slot, int here, int ranks, int turns) {
  HAL_GLOBAL hal_u32 *board = HAL_AT(HAL_GLOBAL hal_u32, boards[here]);
  hal_u32 last = epoch[0];
  for (int peer = HAL_THREAD; peer < ranks; peer += THREADS)
    for (int turn = 0; turn < turns && HAL_LOAD_ACQUIRE(board + ep_read(slot, ranks, peer)) != last; turn++) {
    }
  HAL_BARRIER();
  if (HAL_THREAD == 0) epoch[0] = last + 1;
}
