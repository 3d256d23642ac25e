/* Expert parallelism: rows on their way between ranks.
 *
 * Every file is compiled for itself, after this one. Rows and lists are 32-bit integers; -1 is nobody and nowhere.
 */

/* Whose choice this is: the number of one of `bins` runs of `span` experts from `base` on, or -1. */
HAL_INLINE int ep_bin(int expert, int base, int span, int bins) {
  int from_base = expert - base;
  return expert < 0 || from_base < 0 || from_base >= span * bins ? -1 : from_base / span;
}

/* In place: sums[i] becomes the sum of sums[0 ... i], by a group of so many threads. */
HAL_INLINE void ep_scan(HAL_LOCAL int *sums, int thread, int threads) {
  for (int reach = 1; reach < threads; reach *= 2) {
    int earlier = thread >= reach ? sums[thread - reach] : 0;
    HAL_BARRIER();
    sums[thread] += earlier;
    HAL_BARRIER();
  }
}
