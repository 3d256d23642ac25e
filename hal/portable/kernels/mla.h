/* MLA decode: how a step is cut. Read this before the three kernels.
 *
 * The query rows of a sequence and KV head (queries x heads of its group) are cut into tiles of ROWS; a tile and its KV
 * head are a *unit*. The tokens of a unit come in blocks of BLOCK, `span` blocks make a *piece*, and a work group
 * takes pieces one after the other. A unit of one piece is finished where it is computed. Of every other one each piece
 * leaves its maximum, sum and unscaled output in a *slot*, and `mla_merge` joins them in order.
 *
 * `mla_schedule` chooses the span: usually one for all, such that `parts` pieces and one more a unit suffice; with
 * `chunks` (batch invariance) one that follows from the sequence alone. Sums over the sequences go into `plan`:
 *   plan[j], j = 0 ... batch                   pieces of the sequences before j
 *   plan[batch + 1 + j], j = 0 ... batch       slots of the sequences before j
 *   plan[2 * (batch + 1) + j], j < batch       span of sequence j
 * Lengths and offsets of queries come from outside. Whatever they hold, every loop over them is bounded by the host.
 */
#define MOST 2147483647

/* Queries of sequence j; where they begin is `start`, 0 where all have the same number. */
HAL_INLINE hal_long queries_of(HAL_GLOBAL const int *starts, int ragged, int s_q, int j) {
  hal_long count = s_q;
  if (ragged) count = (hal_long)starts[j + 1] - starts[j];
  return count > 0 ? count : 0;
}

HAL_INLINE hal_long blocks_of(HAL_GLOBAL const int *lengths, int j) {
  int length = lengths[j];
  return length > 0 ? ((hal_long)length + BLOCK - 1) / BLOCK : 0;
}

HAL_INLINE hal_long tiles_of(hal_long queries, int group) { return (queries * group + ROWS - 1) / ROWS; }

HAL_INLINE hal_long pieces_of(hal_long blocks, hal_long span) {
  hal_long pieces = (blocks + span - 1) / span;
  return pieces > 1 ? pieces : 1;
}

/* The sequence whose share of a prefix sum holds x: the last j with prefix[j] <= x. */
HAL_INLINE int sequence_of(HAL_GLOBAL const hal_long *prefix, int batch, hal_long x) {
  int low = 0, high = batch;
  while (high - low > 1) {
    int middle = low + (high - low) / 2;
    if (prefix[middle] <= x)
      low = middle;
    else
      high = middle;
  }
  return low;
}
