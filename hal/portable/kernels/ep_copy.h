/* Copy rows by a list of them: to[i] = from[list[i]]. WORD is the bytes of a word, 16 or 4.
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

HAL_KERNEL(THREADS)
void ep_copy(HAL_GLOBAL ep_word *to, HAL_GLOBAL const ep_word *from, HAL_GLOBAL const int *list, int rows, int most,
             int words, hal_long list_at, hal_long to_at, hal_long to_stride, hal_long from_at, hal_long from_stride,
             int clear) {
#if WORD == 16
  ep_word nothing = HAL_NO_WORDS;
#else
  ep_word nothing = 0;
#endif
  for (hal_long row = HAL_GROUP; row < rows; row += HAL_GROUPS) {
    int source = list[list_at + row];
    int there = source >= 0 && source < most;
    if (!there && !clear) continue;
    for (int i = HAL_THREAD; i < words; i += THREADS)
      to[to_at + row * to_stride + i] = there ? from[from_at + source * from_stride + i] : nothing;
  }
}
