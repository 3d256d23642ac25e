/* Kernels with a bug each, unless they are asked to be `right`: what the simulator must find, and where it must not. */
#define ARGUMENTS HAL_GLOBAL float *to, HAL_GLOBAL float *from, int n, int right
#define ITEM HAL_THREAD, group = HAL_GROUP, i = group * n + item; (void)i

HAL_KERNEL(128) void local_barrier_missing(ARGUMENTS) {
  HAL_SHARED(float, room, 128);
  int item = ITEM;
  room[item] = from[i];
  if (right) HAL_BARRIER();
  to[i] = room[n - 1 - item];
}

HAL_KERNEL(128) void local_overwritten_too_early(ARGUMENTS) {
  HAL_SHARED(float, room, 128);
  int item = ITEM;
  float sum = 0.0f;
  for (int round = 0; round < 2; round++) {
    room[item] = from[i] + round;
    HAL_BARRIER();
    sum += room[n - 1 - item];
    if (right) HAL_BARRIER();
  }
  to[i] = sum;
}

HAL_KERNEL(128) void local_written_by_two(ARGUMENTS) {
  HAL_SHARED(float, room, 128);
  int item = ITEM;
  room[right ? item : item / 2] = from[i];
  HAL_BARRIER();
  to[i] = room[right ? item : item / 2];
}

HAL_KERNEL(128) void local_wavefront_synchronous(ARGUMENTS) {
  HAL_SHARED(float, room, 128);
  int item = ITEM;
  room[item] = from[i];
  HAL_BARRIER();
  for (int reach = n / 2; reach > 0; reach /= 2) {
    if (item < reach) room[item] += room[item + reach];
    if (right || reach > 32) HAL_BARRIER(); /* "within a wavefront all run together" */
  }
  if (item == 0) to[group] = room[0];
}

HAL_KERNEL(128) void local_one_past_the_end(ARGUMENTS) {
  HAL_SHARED(float, room, 128);
  HAL_SHARED(float, other, 128);
  int item = ITEM;
  room[right ? item : item + 1] = from[i];
  other[item] = from[i];
  HAL_BARRIER();
  to[i] = room[right ? item : item + 1] + other[item];
}

HAL_KERNEL(128) void local_one_before_the_beginning(ARGUMENTS) {
  HAL_SHARED(float, room, 128);
  int item = ITEM;
  room[item] = from[i];
  HAL_BARRIER();
  to[i] = right && item == 0 ? 0.0f : room[item - 1];
}

HAL_KERNEL(128) void local_pitch_too_small(ARGUMENTS) {
  HAL_SHARED(float, rows, 8 * 16);
  int item = ITEM;
  int pitch = right ? 16 : 17;
  rows[item / 16 * pitch + item % 16] = from[i];
  HAL_BARRIER();
  to[i] = rows[item / 16 * pitch + item % 16];
}

HAL_KERNEL(128) void local_half_written(ARGUMENTS) {
  HAL_SHARED(float, room, 128);
  int item = ITEM;
  if (right || item < n / 2) room[item] = from[i];
  HAL_BARRIER();
  to[i] = room[n - 1 - item];
}

HAL_KERNEL(128) void local_left_by_the_group_before(ARGUMENTS) {
  HAL_SHARED(float, room, 128);
  int item = ITEM;
  if (right || group == 0) room[item] = from[item];
  HAL_BARRIER();
  to[i] = room[item];
}

HAL_KERNEL(128) void local_too_much(ARGUMENTS) {
  HAL_SHARED(float, room, 20 << 10);
  int item = ITEM;
  room[item] = from[i];
  HAL_BARRIER();
  to[i] = room[n - 1 - item];
}

HAL_KERNEL(128) void shuffle_wider_than_a_wavefront(ARGUMENTS) {
  int item = ITEM;
  float value = from[i];
  int width = right ? n / 4 : n / 2; /* 32 and 64 lanes */
  for (int offset = width / 2; offset > 0; offset /= 2) value += HAL_SHUFFLE_XOR(HAL_ALL_LANES, value, offset, width);
  to[i] = value;
}

HAL_KERNEL(128) void shuffle_of_some_lanes(ARGUMENTS) {
  int item = ITEM;
  float value = from[i];
  if (right || item % 2) value = HAL_SHUFFLE_XOR(HAL_ALL_LANES, value, 2, 8);
  to[i] = value;
}

HAL_KERNEL(128) void shuffle_with_nobody(ARGUMENTS) {
  int item = ITEM;
  to[i] = HAL_SHUFFLE_XOR(HAL_ALL_LANES, from[i], right ? 1 : 16, 32);
}

HAL_KERNEL(128) void barrier_of_some_items(ARGUMENTS) {
  int item = ITEM;
  if (right || item < n / 2) HAL_BARRIER();
  to[i] = from[i];
}

HAL_KERNEL(128) void barrier_in_a_loop_of_some(ARGUMENTS) {
  int item = ITEM;
  for (int round = 0; round < (right ? 4 : item / 32); round++) HAL_BARRIER();
  to[i] = from[i];
}

HAL_KERNEL(128) void barrier_after_a_return(ARGUMENTS) {
  int item = ITEM;
  if (!right && item == n - 1) return;
  HAL_BARRIER();
  to[i] = from[i];
}

HAL_KERNEL(128) void barriers_of_two_branches(ARGUMENTS) {
  int item = ITEM;
  if (!right && item % 2) {
    HAL_BARRIER();
    to[i] = from[i];
  } else {
    HAL_BARRIER();
    to[i] = from[i];
  }
}

HAL_KERNEL(128) void read_past_the_end(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[right ? i : i + 1];
}

HAL_KERNEL(128) void written_past_the_end(ARGUMENTS) {
  int item = ITEM;
  to[right ? i : i + 1] = from[i];
}

HAL_KERNEL(128) void written_far_past_the_end(ARGUMENTS) {
  int item = ITEM;
  to[right ? i : i * 4096] = from[i];
}

HAL_KERNEL(128) void read_before_the_beginning(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[right ? i : i - 1];
}

HAL_KERNEL(128) void sums_into_what_was_never_written(ARGUMENTS) {
  int item = ITEM;
  if (right) to[i] = 0.0f;
  to[i] += from[i];
}

HAL_KERNEL(128) void groups_write_the_same(ARGUMENTS) {
  int item = ITEM;
  to[right ? i : item] = from[i];
}

HAL_KERNEL(128) void group_reads_what_another_writes(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[i];
  if (!right && group > 0) to[i] += to[i - n];
}

HAL_KERNEL(128) void global_barrier_missing(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[i];
  if (right) HAL_BARRIER();
  float neighbour = to[group * n + (item ^ 1)];
  if (right) HAL_BARRIER();
  to[i] += neighbour;
}

/* One item writes plainly, then all of them atomically: whoever comes after whom. */
HAL_KERNEL(128) void counted_before_it_was_cleared(ARGUMENTS) {
  int item = ITEM;
  int *count = (int *)to + group * n;
  if (item == 0) *count = 0;
  if (right) HAL_BARRIER();
  atomicAdd(count, 1);
  if (item) to[i] = from[i];
}

HAL_KERNEL(128) void count_read_before_all_have_counted(ARGUMENTS) {
  HAL_SHARED(int, count, 1);
  int item = ITEM;
  if (item == 0) *count = 0;
  HAL_BARRIER();
  atomicAdd(count, 1);
  if (right) HAL_BARRIER();
  to[i] = item == n - 1 ? (float)*count : from[i];
}

HAL_KERNEL(128) void groups_count_what_one_of_them_cleared(ARGUMENTS) {
  int item = ITEM;
  int *count = (int *)to + (right ? group * n : 0);
  if (item == 0 && (right || group == 0)) *count = 0;
  if (item == 0) atomicAdd(count, 1);
  if (item) to[i] = from[i];
}

HAL_KERNEL(128) void divides_by_nothing(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[i] + (float)(item / (right + (item != 77)));
}

__attribute__((noinline)) static int deep(int depth, volatile int *before) {
  volatile int room[64];
  room[0] = depth + before[0];
  return depth ? deep(depth - 1, room) + room[depth % 64] : room[0];
}
HAL_KERNEL(128) void recurses_too_deep(ARGUMENTS) {
  int item = ITEM;
  volatile int start = item;
  to[i] = from[i] + (float)deep(right || item != 77 ? 3 : 1 << 20, &start);
}

/* For a second or more, whatever the compiler makes of it. */
HAL_KERNEL(128) void takes_its_time(ARGUMENTS) {
  int item = ITEM;
  volatile hal_u32 x = (hal_u32)item;
  if (item == 0)
    for (hal_u32 turn = 0; turn < 3000000000u; turn++) x = x + turn;
  to[i] = (float)x;
}

HAL_KERNEL(128) void right_enough(ARGUMENTS) {
  int item = ITEM;
  to[i] = from[i] + right;
}
