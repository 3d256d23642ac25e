/* Ranks meet on their devices. Every rank has a board that all of its node can write: for each call a header from every
 * rank, whose first word is its flag, and a word by which that rank says that it has read what was staged for the call.
 * RING calls may be under way. CHANNELS places more are shared by calls of captured graphs: which round is on there only the
 * device knows, by a word of its own (`epoch`) that stands for the call's number.
 *
 * A header has the call's number, its kind, what is wrong with it, the window its rows are staged in, how many there are,
 * and EP_AGREE words that all ranks must agree on.
 */
#define EP_KIND 1
#define EP_WRONG 2
#define EP_WINDOW 3
#define EP_COUNT 4
#define EP_FIELDS 5
#define EP_AGREE 9
#define EP_HEAD 16

/* What became of a peer's header: hal.portable.direct.board has the same. */
#define EP_LATE 1
#define EP_DIFFERS 2
#define EP_UNKNOWN 3
#define EP_OUTSIDE 4
#define EP_MET 5

/* A peer as the later kernels of a call see it: EP_MET if all is well, where its rows are staged, how many. */
#define EP_PEER 3

HAL_INLINE hal_long ep_head(int slot, int ranks, int peer) { return ((hal_long)slot * ranks + peer) * EP_HEAD; }
HAL_INLINE hal_long ep_read(int slot, int ranks, int peer) { return ((hal_long)(RING + CHANNELS) * EP_HEAD + slot) * ranks + peer; }
HAL_INLINE int ep_round(HAL_GLOBAL const hal_u32 *epoch, int call) { return epoch == 0 ? call : (int)epoch[0]; }
HAL_INLINE hal_long ep_up16(hal_long size) { return (size + 15) / 16 * 16; }

/* What a rank stages: rows, their scales, their routes, their weights, each part from a multiple of 16 bytes on. */
HAL_INLINE hal_long ep_part(int part, hal_long count, int row, int scale, int topk, int weight) {
  hal_long at = 0;
  if (part > 0) at += ep_up16(count * row);
  if (part > 1) at += ep_up16(count * scale);
  if (part > 2) at += ep_up16(count * topk * 4);
  if (part > 3) at += ep_up16(count * weight);
  return at;
}

/* Whether all ranks have met: else there is nothing to do. */
HAL_INLINE int ep_all_met(HAL_GLOBAL const hal_long *met, int ranks) {
  int all = 1;
  for (int peer = 0; peer < ranks; peer++) all &= met[peer * EP_PEER] == EP_MET;
  return all;
}
