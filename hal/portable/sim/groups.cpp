/* A work group: every work-item is a fibre, all of them take turns in one thread of the host.
 *
 * An item runs until it must wait for others: at a barrier for all of the group, at a shuffle for all of its wavefront.
 * Those who wait for each other must wait at the same place; anything else would hang or be undefined on a chip, so it
 * ends the launch. Groups run side by side in threads of the host, or one by one where accesses are checked.
 */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <random>
#include <thread>

#include "simulator.h"

#if defined(__x86_64__)
asm(R"(
.text
.type hal_sim_switch, @function
hal_sim_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
namespace {
constexpr size_t SAVED = 6, LINK = 6, FRAME = 8; /* words: registers, where the return address is, all of it */
}
#elif defined(__aarch64__)
asm(R"(
.text
.type hal_sim_switch, %function
hal_sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
namespace {
constexpr size_t SAVED = 20, LINK = 11, FRAME = 20;
}
#else
#error "fibres are written for x86-64 and aarch64"
#endif
/* Keep what a function must keep on this stack, note where in *from, and go on on another. */
extern "C" void hal_sim_switch(void **from, void *to);

namespace sim {
namespace {
/* A page at the end of each stack is out of bounds. */
constexpr size_t STACK = 64 << 10, GUARD = 4 << 10, STACK_LEFT = 4 << 10, MOST_GUARDS = 16 << 10;

enum State { RUNS, BARRIER, SHUFFLE, OVER };
struct Item {
  void *stack;
  State state;
  const char *file;
  int line, place, how, operand, width;
  unsigned long long value;
};
}  // namespace

/* What one thread of the host needs to run groups. */
struct Worker {
  Launch *launch;
  Where where;
  void *scheduler;
  std::vector<Item> items;
  std::vector<unsigned> turn; /* who runs, in this order, until the scheduler looks again */
  size_t at;                  /* in `turn` */
  char *stacks = nullptr;
  size_t stack_count = 0;
  std::vector<Cell> local_cells;
  std::vector<uint16_t> phases; /* of the wavefronts: shuffles so far */
  std::mt19937 random;
  std::string failure;
  faults::Fault fault;
  std::unique_ptr<char[]> signal_stack{new char[faults::STACK]};

  ~Worker() {
    if (stacks) munmap(stacks, stack_count * STACK);
  }
  Item &item() { return items[turn[at]]; }
};

namespace {
__attribute__((tls_model("initial-exec"))) thread_local Worker *worker;
std::vector<std::unique_ptr<Worker>> idle;
std::mutex idle_gate;
uint32_t serials;

/* The next one whose turn it is, or the scheduler. */
void go_on(Worker &w) {
  Item &mine = w.item();
  w.at++;
  bool more = w.at < w.turn.size();
  w.where.item = more ? w.turn[w.at] : 0;
  hal_sim_switch(&mine.stack, more ? w.item().stack : w.scheduler);
}

[[noreturn]] void fail(Worker &w, std::string why) {
  w.failure = std::move(why);
  hal_sim_switch(&w.item().stack, w.scheduler);
  __builtin_unreachable();
}

const char *const NO_STACK = " needs more than 56 KiB of stack";

void wait(Worker &w, State state, const char *file, int line, int place) {
  Item &mine = w.item();
  mine.state = state, mine.file = file, mine.line = line, mine.place = place;
  char here;
  if (&here < w.stacks + (w.turn[w.at] * STACK) + GUARD + STACK_LEFT) fail(w, check::work_item(w.where) + NO_STACK);
  go_on(w);
}

void begin() {
  Worker &w = *worker;
  w.launch->function.kernel->call(w.launch->given.data());
  w.item().state = OVER;
  go_on(w);
}

unsigned index(int which) {
  const Worker &w = *worker;
  switch (which) {
    case 0: return w.where.item;
    case 1: return w.where.group;
    case 2: return w.launch->groups;
    case 3: return w.launch->threads;
    default: return w.launch->chip->wavefront;
  }
}

void barrier(const char *file, int line, int place) { wait(*worker, BARRIER, file, line, place); }

unsigned long long shuffle(unsigned long long value, int how, int operand, int width, const char *file, int line,
                           int place) {
  Worker &w = *worker;
  Item &mine = w.item();
  mine.value = value, mine.how = how, mine.operand = operand, mine.width = width;
  wait(w, SHUFFLE, file, line, place);
  return mine.value;
}

void access(const void *address, unsigned long size, int kind, const void *from) {
  Worker &w = *worker;
  if (!w.launch->checks.accesses()) return; /* compiled to be looked at, and run without */
  if ((const char *)address >= w.where.stacks_begin && (const char *)address < w.where.stacks_end) return;
  std::string why = check::access(w.where, address, size, kind, from);
  if (!why.empty()) fail(w, std::move(why));
}

void acquired(const void *address, unsigned long size, const void *from) {
  Worker &w = *worker;
  std::string why = check::acquired(w.where, address, size, from);
  if (!why.empty()) fail(w, std::move(why));
}

void fence(int scope) {
  if (worker->launch->checks.fences) fences::fence(worker->where, scope);
}

const hal_sim_engine engine = {index, barrier, shuffle, access, acquired, fence};

std::string place(const Item &item) {
  const char *name = strrchr(item.file, '/');
  return std::string(name ? name + 1 : item.file) + ":" + std::to_string(item.line);
}

std::string waits(const Worker &w, unsigned number) {
  const Item &item = w.items[number];
  std::string who = "work-item " + std::to_string(number);
  if (item.state == OVER) return who + " has ended";
  return who + " waits at the " + (item.state == BARRIER ? "barrier" : "shuffle") + " of " +
         place(item);
}

std::string parted(const Worker &w, const char *whose, unsigned one, unsigned other) {
  return w.launch->function.kernel->name + std::string(": work-items of ") + whose + "group " +
         std::to_string(w.where.group) + " wait at different places: " + waits(w, one) + ", " + waits(w, other);
}

/* All of a wavefront wait at one shuffle: give everyone what it asked for. */
std::string exchange(Worker &w, unsigned first, unsigned end) {
  unsigned wavefront = w.launch->chip->wavefront;
  unsigned long long values[256];
  for (unsigned i = first; i < end; i++) values[i - first] = w.items[i].value;
  for (unsigned i = first; i < end; i++) {
    Item &item = w.items[i];
    unsigned width = (unsigned)item.width, lane = i - first;
    auto wrong = [&](const std::string &what) {
      return w.launch->function.kernel->name + std::string(": work-item ") + std::to_string(i) + " of group " +
             std::to_string(w.where.group) + " " + what + " at " +
             place(item);
    };
    if (width < 1 || width > wavefront || width & (width - 1))
      return wrong("shuffles " + std::to_string(item.width) + " lanes of a wavefront of " + std::to_string(wavefront));
    int begin = (int)(lane / width * width), other = (int)lane;
    switch (item.how) {
      case HAL_SIM_XOR: other ^= item.operand; break;
      case HAL_SIM_DOWN: other += item.operand; break;
      case HAL_SIM_UP: other -= item.operand; break;
      default: other = begin + (int)((unsigned)item.operand % width);
    }
    if (other < begin || other >= begin + (int)width) other = (int)lane;
    if (first + (unsigned)other >= end) return wrong("shuffles with lane " + std::to_string(other) + ", which is not there");
    item.value = values[other];
  }
  return "";
}

/* Who can go on, now that everyone waits or is over. */
std::string next_turn(Worker &w) {
  unsigned count = w.launch->threads, wavefront = w.launch->chip->wavefront;
  w.turn.clear();
  for (unsigned first = 0; first < count; first += wavefront) {
    unsigned end = std::min(first + wavefront, count), shuffling = 0;
    for (unsigned i = first; i < end; i++) shuffling += w.items[i].state == SHUFFLE;
    if (!shuffling) continue;
    for (unsigned i = first; i < end; i++) {
      const Item &one = w.items[first], &other = w.items[i];
      if (one.state != other.state || one.place != other.place) return parted(w, "a wavefront of ", first, i);
    }
    std::string wrong = exchange(w, first, end);
    if (!wrong.empty()) return wrong;
    w.phases[first / wavefront]++;
    for (unsigned i = first; i < end; i++) w.turn.push_back(i);
  }
  if (w.turn.empty()) {
    for (unsigned i = 0; i < count; i++) {
      const Item &one = w.items[0], &other = w.items[i];
      if (one.state != other.state || (one.state == BARRIER && one.place != other.place))
        return parted(w, "", 0, i);
    }
    if (w.items[0].state == OVER) return "";
    w.where.epoch++;
    for (unsigned i = 0; i < count; i++) w.turn.push_back(i);
  }
  if (w.launch->checks.order) std::shuffle(w.turn.begin(), w.turn.end(), w.random);
  return "";
}

std::string run_group(Worker &w, unsigned group) {
  unsigned count = w.launch->threads;
  w.where.group = group, w.where.epoch = 1, w.where.serial = __atomic_add_fetch(&serials, 1, __ATOMIC_RELAXED);
  w.turn.clear();
  for (unsigned i = 0; i < count; i++) {
    void **top = (void **)(w.stacks + (i + 1) * STACK) - FRAME;
    memset(top, 0, FRAME * sizeof(void *));
    top[LINK] = (void *)begin;
    w.items[i] = {};
    w.items[i].stack = top;
    w.turn.push_back(i);
  }
  if (w.launch->checks.order) std::shuffle(w.turn.begin(), w.turn.end(), w.random);
  w.failure.clear();
  while (!w.turn.empty()) {
    w.at = 0;
    w.where.item = w.turn[0];
    hal_sim_switch(&w.scheduler, w.item().stack);
    if (w.failure.empty()) w.failure = next_turn(w);
    if (!w.failure.empty()) return w.failure;
  }
  return "";
}

std::unique_ptr<Worker> take(Launch &launch) {
  std::unique_ptr<Worker> w;
  {
    std::lock_guard<std::mutex> lock(idle_gate);
    if (!idle.empty()) w = std::move(idle.back()), idle.pop_back();
  }
  if (!w) w = std::make_unique<Worker>();
  if (w->stack_count < launch.threads) {
    if (w->stacks) munmap(w->stacks, w->stack_count * STACK);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    w->stacks = (char *)mmap(nullptr, launch.threads * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    w->stack_count = launch.threads;
    /* Each of them is a mapping more, of which a process has 65530. */
    bool guarded = launch.threads * std::max(1u, std::thread::hardware_concurrency()) <= MOST_GUARDS;
    for (unsigned i = 0; guarded && i < launch.threads; i++) mprotect(w->stacks + i * STACK, GUARD, PROT_NONE);
  }
  w->items.resize(launch.threads);
  w->launch = &launch;
  Module &module = *launch.function.module;
  char *local = (char *)module.here() - module.anchor;
  if (launch.checks.accesses() && w->local_cells.size() < module.local_size) w->local_cells.resize(module.local_size);
  w->phases.assign(launch.threads / launch.chip->wavefront + 1, 0);
  w->where = {&launch, 0, 0, 0, 0, w->phases.data(), local, w->stacks, w->stacks + w->stack_count * STACK, &w->local_cells};
  w->random.seed(launch.checks.seed);
  return w;
}
}  // namespace

const hal_sim_engine *the_engine() { return &engine; }

char *running::caught(const faults::Fault &fault, const char *stack) {
  Worker *w = worker;
  if (!w || stack < w->where.stacks_begin || stack >= w->where.stacks_end) return nullptr;
  w->fault = fault;
  /* Nothing of what the item was at is needed any more. */
  return w->stacks + (w->turn[w->at] + 1) * STACK;
}

void running::tell() {
  Worker &w = *worker;
  const faults::Fault &fault = w.fault;
  const Module &module = *w.launch->function.module;
  char *end = w.stacks + w.turn[w.at] * STACK, address[32];
  snprintf(address, sizeof address, "0x%zx", (size_t)fault.address);
  std::string why;
  if (fault.signal == SIGFPE)
    why = " divides an integer by zero, or the least there is by -1";
  else if (fault.signal == SIGILL)
    why = " does what the compiler saw to be undefined";
  else if (fault.address >= end && fault.address < end + GUARD)
    why = NO_STACK;
  else
    why = std::string(" uses address ") + address + ": not memory of the device";
  std::string place;
  if ((uintptr_t)fault.instruction >= module.begin && (uintptr_t)fault.instruction < module.end && module.checked)
    place = " (" + modules::place(module, fault.instruction + 1) + ")";
  fail(w, check::work_item(w.where) + why + place);
}

std::string check::work_item(const Where &where) {
  return where.launch->function.kernel->name + std::string(": work-item ") + std::to_string(where.item) + " of group " +
         std::to_string(where.group);
}

std::string run(Launch &launch) {
  std::vector<unsigned> groups;
  if (launch.checks.order) {
    groups.resize(launch.groups);
    std::iota(groups.begin(), groups.end(), 0);
    std::mt19937 random(launch.checks.seed);
    std::shuffle(groups.begin(), groups.end(), random);
  }
  std::atomic<unsigned> next{0};
  std::string failure;
  std::mutex failure_gate;
  faults::Watch watch;
  auto groups_of = [&](Worker &w) {
    faults::Stack stack(w.signal_stack.get());
    Worker *outer = worker;
    worker = &w;
    for (unsigned i; (i = next++) < launch.groups;) {
      std::string why = run_group(w, groups.empty() ? i : groups[i]);
      if (why.empty()) continue;
      next = launch.groups;
      std::lock_guard<std::mutex> lock(failure_gate);
      if (failure.empty()) failure = why;
    }
    worker = outer;
  };
  auto work = [&] {
    auto w = take(launch);
    groups_of(*w);
    std::lock_guard<std::mutex> lock(idle_gate);
    idle.push_back(std::move(w));
  };
  bool one_by_one = launch.checks.accesses() || launch.checks.order;
  unsigned side_by_side = one_by_one ? 1 : std::min(std::max(1u, std::thread::hardware_concurrency()), launch.groups);
  std::vector<std::thread> others;
  for (unsigned i = 1; i < side_by_side; i++) others.emplace_back(work);
  work();
  for (std::thread &other : others) other.join();
  return failure;
}
}  // namespace sim
