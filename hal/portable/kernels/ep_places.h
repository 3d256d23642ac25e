/* Where rows lie, from the counts: what ranks send for a bin stands one after the other, by rank.
 *
 * `bases` has for every bin that rows are ordered by where this rank's rows begin there; `begins` [ranks, own bins] where
 * those of each rank begin here. By rank a receiver's rows begin at 0; in the expanded layout each expert's begin at a
 * multiple of `alignment` after those before it; in the packed one (`slots` not 0) at so many an expert.
 * One group, which at last tells the host all counts.
 */
HAL_KERNEL(THREADS)
void ep_places(HAL_GLOBAL const hal_long *met, HAL_GLOBAL const int *counts, HAL_GLOBAL int *bases,
               HAL_GLOBAL int *begins, HAL_GLOBAL int *totals, HAL_GLOBAL hal_long *ranges, HAL_GLOBAL int *received,
               HAL_GLOBAL hal_u32 *told, int here, int ranks, int local, int by_rank, int experts, int expanded,
               int alignment, int slots, int call) {
  int thread = HAL_THREAD, bins = by_rank + experts, skip = expanded ? by_rank : 0;
  int spots = expanded ? experts : ranks, own = expanded ? local : 1;
  if (!ep_all_met(met, ranks)) return;
  for (int spot = thread; spot < spots; spot += THREADS) {
    int sum = 0;
    for (int source = 0; source < ranks; source++) {
      if (source == here) bases[spot] = sum;
      sum += counts[source * bins + skip + spot];
    }
    totals[spot] = sum;
  }
  HAL_BARRIER();
  if (expanded)
    for (int rank = thread; rank < ranks; rank += THREADS) {
      int at = 0;
      for (int e = 0; e < local; e++) {
        int spot = rank * local + e, start = slots ? e * slots : at;
        bases[spot] += start;
        at += (totals[spot] + alignment - 1) / alignment * alignment;
        if (rank == here) totals[spots + e] = start;
      }
    }
  HAL_BARRIER();
  for (int one = thread; one < own; one += THREADS) {
    int spot = expanded ? here * local + one : here, at = expanded ? totals[spots + one] : 0, within = 0;
    for (int source = 0; source < ranks; source++) {
      int count = counts[source * bins + skip + spot];
      begins[source * own + one] = at + within;
      if (slots) ranges[(hal_long)one * ranks + source] = (hal_long)within * 65536 * 65536 | count;
      within += count;
    }
    if (slots) received[one] = within;
  }
  if (told != 0) {
    for (int i = thread; i < ranks * bins; i += THREADS) told[1 + i] = (hal_u32)counts[i];
    HAL_BARRIER();
    if (thread == 0) HAL_STORE_RELEASE(told, (hal_u32)call);
  }
}
