/* Count the tokens of every bin and give each its place there, in the order of tokens. A group takes a bin at a time.
 *
 * A token that chose a bin several times counts once. Its first choice there has the place in `order`, the others have
 * -1 or, with `repeat`, the same. `list` has the tokens of bin b from starts[b] on.
 */
HAL_KERNEL(THREADS)
void ep_layout(HAL_GLOBAL const int *idx, HAL_GLOBAL const int *starts, HAL_GLOBAL int *counts, HAL_GLOBAL int *order,
               HAL_GLOBAL int *list, int tokens, int topk, int base, int span, int bins, int repeat) {
  HAL_SHARED(int, sums, THREADS);
  int thread = HAL_THREAD;

  for (int bin = HAL_GROUP; bin < bins; bin += HAL_GROUPS) {
    int before = 0;
    for (int from = 0; from < tokens; from += THREADS) {
      int token = from + thread, first = -1;
      hal_long at = (hal_long)token * topk;
      if (token < tokens)
        for (int k = topk - 1; k >= 0; k--) {
          int found = ep_bin(idx[at + k], base, span, bins);
          if (found == bin) first = k;
          if (found < 0 && bin == 0) order[at + k] = -1;
        }
      sums[thread] = first >= 0;
      HAL_BARRIER();
      ep_scan(sums, thread, THREADS);
      int place = before + sums[thread] - 1;
      if (first >= 0) {
        for (int k = 0; k < topk; k++)
          if (ep_bin(idx[at + k], base, span, bins) == bin) order[at + k] = k == first || repeat ? place : -1;
        list[starts[bin] + place] = token;
      }
      before += sums[THREADS - 1];
      HAL_BARRIER();
    }
    if (thread == 0) counts[bin] = before;
  }
}
