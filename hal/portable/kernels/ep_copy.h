/* Copy rows by a list of them: to[i] = from[list[i]]. WORD is the bytes of a word, 16 or 4. LANES threads share a row, and
 * each has several words under way at once, since those of a peer are long in coming.
 *
 * One kernel serves dispatch (tokens into a peer's window), the gather from the own window, and what combine fetches
 * from a peer's. A row that the list does not have, or that is not among the `most` there are, becomes zeros or, without
 * `clear`, stays as it was.
 */
#if WORD == 16
typedef hal_words ep_word;
#else
typedef hal_u32 ep_word;
#endif
#define EP_AT_ONCE 4

HAL_KERNEL(THREADS)
void ep_copy(HAL_GLOBAL ep_word *to, HAL_GLOBAL const ep_word *from, HAL_GLOBAL const int *list, int rows, int most,
             int words, hal_long list_at, hal_long to_at, hal_long to_stride, hal_long from_at, hal_long from_stride,
             int clear) {
#if WORD == 16
  ep_word nothing = HAL_NO_WORDS;
#else
  ep_word nothing = 0;
#endif
  int side_by_side = THREADS / LANES;
  for (hal_long row = (hal_long)HAL_GROUP * side_by_side + HAL_THREAD / LANES; row < rows;
       row += (hal_long)HAL_GROUPS * side_by_side) {
    int source = list[list_at + row];
    int there = source >= 0 && source < most;
    if (!there && !clear) continue;
    for (int first = HAL_THREAD % LANES; first < words; first += LANES * EP_AT_ONCE) {
      ep_word found[EP_AT_ONCE];
      HAL_UNROLL
      for (int i = 0; i < EP_AT_ONCE; i++) {
        int at = first + i * LANES;
        found[i] = nothing;
        if (there && at < words) found[i] = from[from_at + source * from_stride + at];
      }
      HAL_UNROLL
      for (int i = 0; i < EP_AT_ONCE; i++) {
        int at = first + i * LANES;
        if (at < words) to[to_at + row * to_stride + at] = found[i];
      }
    }
  }
}
