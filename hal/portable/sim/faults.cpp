/* What the processor does not do for a kernel or a copy: an address where nothing is, an integer divided by zero.
 *
 * Signals of a thread that runs a kernel, brought upon it by what it executes there, end the kernel and not the process.
 * So do those of a copy from or to the host. Handlers are there meanwhile, and hand on whatever is not their own.
 */
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>

#include "simulator.h"

namespace sim::faults {
namespace {
constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr size_t COUNT = sizeof SIGNALS / sizeof *SIGNALS;
struct sigaction before[COUNT];
__attribute__((tls_model("initial-exec"))) thread_local sigjmp_buf *copying;

#if defined(__x86_64__)
char *stack(ucontext_t *context) { return (char *)context->uc_mcontext.gregs[REG_RSP]; }
char *instruction(ucontext_t *context) { return (char *)context->uc_mcontext.gregs[REG_RIP]; }
/* As if it had been called there. */
void go_on(ucontext_t *context, char *top, void (*where)()) {
  context->uc_mcontext.gregs[REG_RSP] = (greg_t)(((uintptr_t)top & ~uintptr_t(15)) - sizeof(void *));
  context->uc_mcontext.gregs[REG_RIP] = (greg_t)where;
}
#else
char *stack(ucontext_t *context) { return (char *)context->uc_mcontext.sp; }
char *instruction(ucontext_t *context) { return (char *)context->uc_mcontext.pc; }
void go_on(ucontext_t *context, char *top, void (*where)()) {
  context->uc_mcontext.sp = (uintptr_t)top & ~uintptr_t(15);
  context->uc_mcontext.pc = (uintptr_t)where;
}
#endif

void handle(int signal, siginfo_t *info, void *given) {
  ucontext_t *context = (ucontext_t *)given;
  bool by_itself = info->si_code > 0; /* and not sent by somebody */
  if (by_itself && copying) siglongjmp(*copying, 1);
  Fault fault{signal, (char *)info->si_addr, instruction(context)};
  if (char *top = by_itself ? running::caught(fault, stack(context)) : nullptr) return go_on(context, top, running::tell);
  size_t which = 0;
  while (SIGNALS[which] != signal) which++;
  const struct sigaction &other = before[which];
  if (other.sa_flags & SA_SIGINFO) return other.sa_sigaction(signal, info, given);
  if (other.sa_handler != SIG_DFL && other.sa_handler != SIG_IGN) return other.sa_handler(signal);
  if (other.sa_handler == SIG_IGN && !by_itself) return;
  /* Once this returns, what happened happens again. */
  sigaction(signal, &other, nullptr);
  if (!by_itself) raise(signal);
}
}  // namespace

Watch::Watch() {
  struct sigaction ours = {};
  ours.sa_sigaction = handle;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (size_t i = 0; i < COUNT; i++) sigaction(SIGNALS[i], &ours, &before[i]);
}

/* Unless somebody has put another handler in the place of ours meanwhile. */
Watch::~Watch() {
  for (size_t i = 0; i < COUNT; i++) {
    struct sigaction found;
    sigaction(SIGNALS[i], nullptr, &found);
    if (found.sa_flags & SA_SIGINFO && found.sa_sigaction == handle) sigaction(SIGNALS[i], &before[i], nullptr);
  }
}

bool copied(void *to, const void *from, size_t size) {
  Watch watch;
  sigjmp_buf back;
  copying = &back;
  if (sigsetjmp(back, 1)) return copying = nullptr, false;
  memcpy(to, from, size);
  return copying = nullptr, true;
}

Stack::Stack(char *base) {
  stack_t ours = {base, 0, STACK};
  sigaltstack(&ours, &before);
}

Stack::~Stack() { sigaltstack(&before, nullptr); }
}  // namespace sim::faults
