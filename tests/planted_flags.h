/* Kernels that tell another process of what they wrote, and kernels that read what they were told of: with a bug each,
 * unless they are asked to be `right`. Those that write have names with `flag`.
 */
#define ARGUMENTS HAL_GLOBAL float *to, HAL_GLOBAL float *from, int n, int right
#define ITEM HAL_THREAD, group = HAL_GROUP, i = group * n + item; (void)i

/* A flag for the rows of each group. */
#define FLAG ((hal_u32 *)to + 2 * n + group)
#define TOLD       \
  to[i] = from[i]; \
  HAL_BARRIER();   \
  if (item == 0)

HAL_KERNEL(128) void flag_released(ARGUMENTS) {
  int item = ITEM;
  TOLD HAL_STORE_RELEASE(FLAG, 1u);
}

HAL_KERNEL(128) void flag_stored_without_release(ARGUMENTS) {
  int item = ITEM;
  TOLD __atomic_store_n(FLAG, 1u, right ? __ATOMIC_RELEASE : __ATOMIC_RELAXED);
}

HAL_KERNEL(128) void flag_stored_plainly(ARGUMENTS) {
  int item = ITEM;
  TOLD {
    if (right) HAL_STORE_RELEASE(FLAG, 1u);
    else *FLAG = 1u;
  }
}

HAL_KERNEL(128) void flag_without_fence(ARGUMENTS) {
  int item = ITEM;
  TOLD {
    if (right) __threadfence_system();
    *(volatile hal_u32 *)FLAG = 1u;
  }
}

HAL_KERNEL(128) void flag_behind_a_fence_of_the_device(ARGUMENTS) {
  int item = ITEM;
  TOLD {
    if (right) __threadfence_system();
    else __threadfence();
    __atomic_store_n(FLAG, 1u, __ATOMIC_RELAXED);
  }
}

HAL_KERNEL(128) void flag_without_barrier(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[i];
  if (right) HAL_BARRIER();
  if (item == 0) HAL_STORE_RELEASE(FLAG, 1u);
}

HAL_KERNEL(128) void flag_before_its_row(ARGUMENTS) {
  int item = ITEM;
  if (item || right) to[i] = from[i];
  HAL_BARRIER();
  if (item == 0) HAL_STORE_RELEASE(FLAG, 1u);
  if (item == 0 && !right) to[i] = from[i];
}

/* A count of groups that are ready, the last of which tells of them all: nothing is wrong with it. */
HAL_KERNEL(128) void flag_of_all_groups(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[i];
  HAL_BARRIER();
  if (item == 0) __atomic_fetch_add((hal_u32 *)to + 2 * n, 1u, __ATOMIC_RELEASE);
}

/* The same by one flag, of the group that finds all others done. */
HAL_KERNEL(128) void flag_of_the_last_group(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[i];
  HAL_BARRIER();
  hal_u32 *count = (hal_u32 *)to + 2 * n + 8;
  if (item == 0 && __atomic_fetch_add(count, 1u, right ? __ATOMIC_ACQ_REL : __ATOMIC_RELAXED) == 1u)
    HAL_STORE_RELEASE((hal_u32 *)to + 2 * n, 2u);
}

#undef FLAG
#define FLAG ((hal_u32 *)from + 2 * n + group)
#define WAIT(acquires) while (item == 0 && !(acquires)) {}

HAL_KERNEL(128) void rows_acquired(ARGUMENTS) {
  int item = ITEM;
  WAIT(HAL_LOAD_ACQUIRE(FLAG))
  HAL_BARRIER();
  to[i] = from[group * n + (item + 1) % n];
}

HAL_KERNEL(128) void rows_of_a_fence(ARGUMENTS) {
  int item = ITEM;
  WAIT(*(volatile hal_u32 *)FLAG)
  if (right) __threadfence_system();
  HAL_BARRIER();
  to[i] = from[group * n + (item + 1) % n];
}

HAL_KERNEL(128) void rows_not_acquired(ARGUMENTS) {
  int item = ITEM;
  WAIT(__atomic_load_n(FLAG, right ? __ATOMIC_ACQUIRE : __ATOMIC_RELAXED))
  HAL_BARRIER();
  to[i] = from[group * n + (item + 1) % n];
}

HAL_KERNEL(128) void rows_without_barrier(ARGUMENTS) {
  int item = ITEM;
  WAIT(HAL_LOAD_ACQUIRE(FLAG))
  if (right) HAL_BARRIER();
  to[i] = from[group * n + (item + 1) % n];
}

HAL_KERNEL(128) void rows_of_all_groups(ARGUMENTS) {
  int item = ITEM;
  WAIT(HAL_LOAD_ACQUIRE((hal_u32 *)from + 2 * n) == 2u)
  HAL_BARRIER();
  to[i] = from[(i + n + 1) % (2 * n)];
}

/* As the library waits: one launch looks at the flag, later ones read. */
HAL_KERNEL(128) void acquires_only(ARGUMENTS) {
  int item = ITEM;
  WAIT(HAL_LOAD_ACQUIRE(right ? FLAG : (hal_u32 *)from + 2 * n))
  to[i] = 0.0f;
}

HAL_KERNEL(128) void reads_only(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[(i + n + 1) % (2 * n)];
}
