/* Tell a peer that what was written before is there, and look whether peers have told. A flag only grows, and begins
 * again where 32 bits end: of two values the later is the one that less than half of them lie before. */

/* After everything that the queue was given before. */
HAL_KERNEL(1)
void ep_signal(HAL_GLOBAL hal_u32 *flags, int at, int value) { HAL_STORE_RELEASE(flags + at, (hal_u32)value); }

/* Group i looks at flag i, `turns` times at most, so that it ends whatever becomes of the peer. */
HAL_KERNEL(1)
void ep_await(HAL_GLOBAL hal_u32 *flags, HAL_GLOBAL int *seen, int stride, int value, int turns) {
  int found = (int)HAL_LOAD_ACQUIRE(flags + HAL_GROUP * stride);
  for (int turn = 1; turn < turns && (int)((hal_u32)found - (hal_u32)value) < 0; turn++)
    found = (int)HAL_LOAD_ACQUIRE(flags + HAL_GROUP * stride);
  seen[HAL_GROUP] = found;
}
