/* A work group on the host: every thread is a fibre, all of them take turns in one thread of the process.
 *
 * A fibre runs until it must wait for others. At a barrier all threads of the group must meet, at a shuffle all of the
 * subgroup, and at the same line: anything else is an error of the kernel, reported and not survived by the group.
 */
#include <stddef.h>
#include <ucontext.h>

#include <utility>
#include <vector>

/* A kernel called with the addresses of its arguments. */
template <auto kernel>
struct Call;
template <typename... Types, void (*kernel)(Types...)>
struct Call<kernel> {
  template <size_t... I>
  static void unpacked(void **given, std::index_sequence<I...>) {
    kernel(*(Types *)given[I]...);
  }
  static void by_address(void **given) { unpacked(given, std::index_sequence_for<Types...>()); }
};

namespace {
constexpr size_t STACK = 64 << 10;

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  int line; /* where it waits, 0 once it is done */
};

std::vector<Fibre> fibres;
ucontext_t scheduler;
int current, group, groups, subgroup = 1;
void (*body)(void **);
void **arguments;
float *exchanged;

void run() {
  body(arguments);
  fibres[current].line = 0;
}

void wait_for_others(int line) {
  fibres[current].line = line;
  swapcontext(&fibres[current].context, &scheduler);
}
}  // namespace

extern "C" {
int hal_host_thread() { return current; }
int hal_host_group() { return group; }
int hal_host_groups() { return groups; }
void hal_host_barrier(int line) { wait_for_others(line); }

float hal_host_shuffle_xor(float value, int offset, int width, int line) {
  /* Subgroups take their turns together with the rest of the group, which only makes them wait longer. */
  exchanged[current] = value;
  wait_for_others(line);
  int lane = current % subgroup, other = lane ^ offset;
  bool there = lane / width == other / width && current - lane + other < (int)fibres.size();
  float found = there ? exchanged[current - lane + other] : value;
  wait_for_others(-line);
  return found;
}

/* Run a kernel; -1 if its threads parted at a barrier, with the two lines in `parted`, else 0. */
__attribute__((visibility("default"))) int hal_host_run(void (*kernel)(void **), void **given, int group_count,
                                                         int thread_count, int subgroup_width, int *parted) {
  std::vector<float> shuffled(thread_count);
  fibres.resize(thread_count);
  for (Fibre &fibre : fibres) fibre.stack.resize(STACK);
  body = kernel, arguments = given, groups = group_count, subgroup = subgroup_width, exchanged = shuffled.data();
  for (group = 0; group < groups; group++) {
    for (Fibre &fibre : fibres) {
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data();
      fibre.context.uc_stack.ss_size = STACK;
      fibre.context.uc_link = &scheduler;
      makecontext(&fibre.context, run, 0);
    }
    do {
      for (current = 0; current < thread_count; current++) swapcontext(&scheduler, &fibres[current].context);
      for (Fibre &fibre : fibres)
        if (fibre.line != fibres[0].line) {
          parted[0] = fibres[0].line, parted[1] = fibre.line;
          return -1;
        }
    } while (fibres[0].line != 0);
  }
  return 0;
}
}
