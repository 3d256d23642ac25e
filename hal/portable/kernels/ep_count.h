/* Who sends what to whom, from the routes of all ranks: every rank counts for itself, and all come to the same.
 *
 * A bin is a rank (the first `by_rank` of them) or one of the `experts` from `first` on. Group (s, b) counts the tokens of
 * rank s for bin b, a token once however often it chose it. Of this rank's own bins it lists the tokens in their order; of
 * this rank's own tokens it says which place in the bin each choice has: -1 where it has none and, without `repeat`, where
 * an earlier choice of the token has it. Bins of the kind that rows are ordered by are `own` ones: experts with
 * `expanded`, else ranks.
 */
#define EP_EACH 4

/* Whether a choice is one of `span` experts from `base` on; nobody's is far beyond as an unsigned number. */
HAL_INLINE int ep_within(int expert, int base, int span) { return (hal_u32)(expert - base) < (hal_u32)span; }

HAL_INLINE int ep_first(HAL_GLOBAL const int *chosen, int topk, int base, int span) {
  int found = -1;
  /* All of them, so that none waits for the one before. */
  for (int k = topk - 1; k >= 0; k--)
    if (ep_within(chosen[k], base, span)) found = k;
  return found;
}

HAL_KERNEL(THREADS)
void ep_count(HAL_GLOBAL const hal_long *met, HAL_GLOBAL const int *routes, HAL_GLOBAL int *counts, HAL_GLOBAL int *order,
              HAL_GLOBAL int *list, int here, int ranks, int most, int topk, int local, int by_rank, int first,
              int experts, int expanded, int repeat) {
  HAL_SHARED(int, sums, THREADS);
  HAL_SHARED(int, place, THREADS * EP_EACH);
  int thread = HAL_THREAD, bins = by_rank + experts;
  if (!ep_all_met(met, ranks)) return;
  for (int pair = HAL_GROUP; pair < ranks * bins; pair += HAL_GROUPS) {
    int source = pair / bins, bin = pair % bins, is_rank = bin < by_rank;
    int base = is_rank ? bin * local : first + bin - by_rank, span = is_rank ? local : 1;
    int tokens = (int)met[source * EP_PEER + 2];
    int orders = source == here && is_rank != expanded;
    int lists = is_rank != expanded && base / local == here;
    HAL_GLOBAL const int *chosen = routes + source * (ep_up16((hal_long)most * topk * 4) / 4);
    hal_long list_at = ((hal_long)source * (expanded ? local : 1) + (expanded ? base - here * local : 0)) * most;
    int before = 0;
    for (int from = 0; from < tokens; from += THREADS * EP_EACH) {
      /* Looked at side by side, counted by threads that have tokens one after the other: one scan places them all. */
      for (int i = thread; i < THREADS * EP_EACH; i += THREADS)
        place[i] = from + i < tokens && ep_first(chosen + (hal_long)(from + i) * topk, topk, base, span) >= 0;
      HAL_BARRIER();
      int count = 0;
      for (int i = 0; i < EP_EACH; i++) count += place[thread * EP_EACH + i];
      sums[thread] = count;
      HAL_BARRIER();
      ep_scan(sums, thread, THREADS);
      int next = before + sums[thread] - count;
      for (int i = 0; i < EP_EACH; i++) {
        int hit = place[thread * EP_EACH + i];
        place[thread * EP_EACH + i] = hit ? next : -1;
        next += hit;
      }
      before += sums[THREADS - 1];
      HAL_BARRIER();
      for (int i = thread; i < THREADS * EP_EACH && (orders || lists); i += THREADS) {
        int token = from + i;
        hal_long at = (hal_long)token * topk;
        if (token >= tokens) continue;
        if (lists && place[i] >= 0) list[list_at + place[i]] = token;
        if (!orders) continue;
        int hit = ep_first(chosen + at, topk, base, span);
        for (int k = 0; k < topk; k++) {
          if (chosen[at + k] < 0 && base == 0) order[at + k] = -1;
          if (ep_within(chosen[at + k], base, span)) order[at + k] = k == hit || repeat ? place[i] : -1;
        }
      }
      HAL_BARRIER();
    }
    if (thread == 0) counts[source * bins + bin] = before;
  }
}

/* Forget the choices by which tokens go to a rank that has no room for them: of rank s the first `accepted[s, d]` get in.
 * A group has a rank's tokens for all ranks, one after the other: what one forgets the next one looks at. */
HAL_KERNEL(THREADS)
void ep_drop(HAL_GLOBAL const hal_long *met, HAL_GLOBAL int *routes, HAL_GLOBAL int *own, HAL_GLOBAL const int *accepted,
             int here, int ranks, int most, int topk, int local) {
  HAL_SHARED(int, sums, THREADS);
  int thread = HAL_THREAD;
  for (int source = HAL_GROUP; source < ranks; source += HAL_GROUPS) {
    int tokens = (int)met[source * EP_PEER + 2];
    HAL_GLOBAL int *chosen = routes + source * (ep_up16((hal_long)most * topk * 4) / 4);
    for (int rank = 0; rank < ranks; rank++) {
      int before = 0;
      for (int from = 0; from < tokens; from += THREADS) {
        int token = from + thread, hit = 0;
        hal_long at = (hal_long)token * topk;
        if (token < tokens)
          for (int k = 0; k < topk; k++) hit |= ep_within(chosen[at + k], rank * local, local);
        sums[thread] = hit;
        HAL_BARRIER();
        ep_scan(sums, thread, THREADS);
        if (hit && before + sums[thread] > accepted[source * ranks + rank])
          for (int k = 0; k < topk; k++)
            if (ep_within(chosen[at + k], rank * local, local)) {
              chosen[at + k] = -1;
              if (source == here) own[at + k] = -1;
            }
        before += sums[THREADS - 1];
        HAL_BARRIER();
      }
    }
  }
}
