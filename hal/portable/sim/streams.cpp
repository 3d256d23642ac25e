/* Streams: work is only queued, and done when somebody waits, in an order drawn from a seed among all that are allowed.
 *
 * So whoever looks at a result without having waited for it sees that it is not there, every time.
 */
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <random>
#include <set>

#include "simulator.h"

/* In the library of every runtime, so that a driver can tell whom it is talking to. */
extern "C" __attribute__((visibility("default"))) const char *halSimulator() { return "HAL_SIM"; }

namespace sim {
std::recursive_mutex gate;

struct Stream {
  unsigned number;
  bool blocking; /* waits for the usual stream, and that for it */
  std::deque<Op> queue;
  unsigned last = 0; /* op */
  std::vector<unsigned> clock, after;
  std::string failure;
};
struct Event {
  unsigned last = 0;
  std::vector<unsigned> clock;
  double at = -1;
};

namespace {
thread_local std::string latest;
}
const std::string &report() { return latest; }
void report(std::string text) { latest = std::move(text); }

namespace streams {
namespace {
struct Past {
  unsigned stream, position;
  std::string what;
};
std::vector<Past> past(1);
std::set<unsigned> pending;
std::set<Stream *> all;
std::map<Event *, std::shared_ptr<Event>> events; /* work that is still to note its time keeps one too */
std::vector<unsigned> of_the_host; /* how far of each stream the host has waited for */
unsigned streams_made;
std::mt19937 lots;

void join(std::vector<unsigned> &to, const std::vector<unsigned> &from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

bool ready(const Stream &stream) {
  const auto &after = stream.queue.front().after;
  return std::none_of(after.begin(), after.end(), [](unsigned op) { return pending.count(op); });
}

void step(Stream &stream) {
  Op op = std::move(stream.queue.front());
  stream.queue.pop_front();
  std::string wrong = op.work(op);
  pending.erase(op.number);
  if (!wrong.empty() && stream.failure.empty()) stream.failure = wrong;
}

/* Do something of some stream; false if there is nothing to do. */
bool some_step() {
  std::vector<Stream *> able;
  for (Stream *stream : all)
    if (!stream->queue.empty() && ready(*stream)) able.push_back(stream);
  if (able.empty()) return false;
  std::sort(able.begin(), able.end(), [](Stream *a, Stream *b) { return a->number < b->number; });
  step(*able[lots() % able.size()]);
  return true;
}

Error outcome(Stream &stream) {
  join(of_the_host, stream.clock);
  if (stream.failure.empty()) return OK;
  report(std::move(stream.failure));
  stream.failure.clear();
  return LAUNCH_FAILURE;
}

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1e3 + time.tv_nsec * 1e-6;
}

void follow(Stream &stream, unsigned op, const std::vector<unsigned> &clock) {
  if (op) stream.after.push_back(op);
  join(stream.clock, clock);
}
}  // namespace

Stream *usual() {
  static Stream *made = [] {
    lots.seed(checks().seed);
    Stream *stream = new Stream{streams_made++, true, {}, 0, {}, {}, ""};
    all.insert(stream);
    return stream;
  }();
  return made;
}

Error create(Stream **made, bool blocking) {
  usual();
  *made = new Stream{streams_made++, blocking, {}, 0, {}, {}, ""};
  all.insert(*made);
  return OK;
}

bool known(Stream *stream) { return !stream || all.count(stream); }

Error destroy(Stream *stream) {
  if (!stream || !all.count(stream)) return INVALID_HANDLE;
  while (!stream->queue.empty() && some_step()) {
  }
  all.erase(stream);
  delete stream;
  return OK;
}

void push(Stream *given, std::string what, std::function<std::string(const Op &)> work) {
  Stream &stream = given ? *given : *usual();
  if (stream.blocking)
    for (Stream *other : all)
      if (other != &stream && other->blocking && (&stream == usual() || other == usual()))
        follow(stream, other->last, other->clock);
  join(stream.clock, of_the_host);
  if (stream.clock.size() <= stream.number) stream.clock.resize(stream.number + 1);
  unsigned number = (unsigned)past.size(), position = ++stream.clock[stream.number];
  past.push_back({stream.number, position, what});
  pending.insert(number);
  stream.queue.push_back({number, std::move(what), std::move(work), std::move(stream.after), stream.clock, stream.number, position});
  stream.after.clear();
  stream.last = number;
  if (checks().eager) drain();
}

bool ordered(unsigned earlier, const Op &later) {
  const Past &past_op = past[earlier];
  return past_op.stream < later.clock.size() && later.clock[past_op.stream] >= past_op.position;
}

std::string name(unsigned op) { return past[op].what + " on stream " + std::to_string(past[op].stream); }

Error synchronize(Stream *given) {
  Stream &stream = given ? *given : *usual();
  if (!all.count(&stream)) return INVALID_HANDLE;
  auto open = [&] {
    if (!stream.queue.empty()) return true;
    /* The usual stream is waited for together with all that wait for it. */
    return &stream == usual() &&
           std::any_of(all.begin(), all.end(), [](Stream *other) { return other->blocking && !other->queue.empty(); });
  };
  while (open() && some_step()) {
  }
  Error error = outcome(stream);
  if (&stream == usual())
    for (Stream *other : all)
      if (other->blocking && other != &stream) error = error ? error : outcome(*other);
  return error;
}

void drain() {
  while (some_step()) {
  }
}

Error synchronize_all() {
  usual();
  drain();
  Error error = OK;
  for (Stream *stream : all) {
    Error one = outcome(*stream);
    error = error ? error : one;
  }
  return error;
}

Error query(Stream *given) {
  Stream &stream = given ? *given : *usual();
  if (!all.count(&stream)) return INVALID_HANDLE;
  some_step(); /* time passes */
  return stream.queue.empty() ? outcome(stream) : NOT_READY;
}

Error create_event(Event **made) {
  auto event = std::make_shared<Event>();
  events[*made = event.get()] = event;
  return OK;
}

Error destroy_event(Event *event) { return events.erase(event) ? OK : INVALID_HANDLE; }

Error record(Event *event, Stream *given) {
  if (!events.count(event) || !known(given)) return INVALID_HANDLE;
  Stream &stream = given ? *given : *usual();
  event->at = -1;
  push(&stream, "an event", [kept = events[event]](const Op &) {
    kept->at = now();
    return std::string();
  });
  event->last = stream.last;
  event->clock = stream.clock;
  return OK;
}

Error wait_for(Stream *given, Event *event) {
  if (!events.count(event) || !known(given)) return INVALID_HANDLE;
  follow(given ? *given : *usual(), event->last, event->clock);
  return OK;
}

Error synchronize_event(Event *event) {
  if (!events.count(event)) return INVALID_HANDLE;
  while (pending.count(event->last) && some_step()) {
  }
  join(of_the_host, event->clock);
  for (Stream *stream : all)
    if (event->last && stream->number == past[event->last].stream && !stream->failure.empty()) return outcome(*stream);
  return OK;
}

Error query_event(Event *event) {
  if (!events.count(event)) return INVALID_HANDLE;
  some_step();
  return pending.count(event->last) ? NOT_READY : OK;
}

Error elapsed(float *milliseconds, Event *from, Event *to) {
  if (!events.count(from) || !events.count(to) || !from->last || !to->last) return INVALID_HANDLE;
  if (from->at < 0 || to->at < 0) return NOT_READY;
  *milliseconds = (float)(to->at - from->at);
  return OK;
}

Error copy(Stream *stream, void *to, const void *from, size_t size) {
  if (!known(stream)) return INVALID_HANDLE;
  push(stream, "a copy", [=](const Op &op) {
    std::string wrong = check::copy(op, to, from, size);
    if (wrong.empty() && !faults::copied(to, from, size))
      wrong = op.what + " of " + std::to_string(size) + " bytes: not all of that memory of the host is there";
    return wrong;
  });
  return OK;
}

Error fill(Stream *stream, void *to, int value, size_t size) {
  if (!known(stream)) return INVALID_HANDLE;
  if (!memory::alive(to, size)) return INVALID_VALUE;
  push(stream, "a fill", [=](const Op &op) {
    std::string wrong = check::copy(op, to, nullptr, size);
    if (wrong.empty()) memset(to, value, size);
    return wrong;
  });
  return OK;
}

Error launch(Stream *stream, Function *function, unsigned groups, unsigned threads, void **given, void **extra,
             const Chip *chip) {
  if (!known(stream) || !modules::known(function)) return INVALID_HANDLE;
  const hal_sim_kernel &kernel = *function->kernel;
  if (!groups || groups > INT32_MAX || !threads || threads > chip->most_threads) return INVALID_VALUE;
  if (!given && !extra && kernel.count) return INVALID_VALUE;
  /* Nothing says how many there are, but who ends them with a null is told. */
  for (unsigned i = 0; given && i < kernel.count; i++) {
    if (given[i]) continue;
    report(std::string(kernel.name) + ": takes " + std::to_string(kernel.count) + " arguments, " + std::to_string(i) +
           " were given");
    return LAUNCH_FAILURE;
  }
  if (modules::local_bytes(*function) > chip->local_bytes) {
    report(std::string(kernel.name) + ": takes " + std::to_string(modules::local_bytes(*function)) +
           " bytes of local memory, a group of " + chip->name + " has " + std::to_string(chip->local_bytes));
    return LAUNCH_FAILURE;
  }
  auto made = std::make_shared<Launch>();
  made->function = *function, made->groups = groups, made->threads = threads, made->chip = chip;
  /* `extra` is a pointer after 1, a size after 2, and 3: the arguments packed as in a struct. */
  const char *packed = given || !extra ? nullptr : (const char *)extra[1];
  std::vector<size_t> offsets;
  size_t size = 0;
  for (unsigned i = 0; i < kernel.count; i++) {
    const hal_sim_parameter &parameter = kernel.parameters[i];
    size = (size + parameter.alignment - 1) / parameter.alignment * parameter.alignment;
    offsets.push_back(size);
    size += parameter.size;
  }
  if (packed && size > *(size_t *)extra[3]) return INVALID_VALUE;
  made->bytes.resize(size + 1);
  for (unsigned i = 0; i < kernel.count; i++) {
    memcpy(&made->bytes[offsets[i]], packed ? packed + offsets[i] : (char *)given[i], kernel.parameters[i].size);
    made->given.push_back(&made->bytes[offsets[i]]);
  }
  push(stream, kernel.name, [made](const Op &op) {
    made->op = &op;
    made->checks = checks();
    if (made->checks.accesses() && !made->function.module->checked)
      return std::string(made->function.kernel->name) + ": was compiled without HAL_SIM_CHECK, and is to be checked";
    std::string wrong = run(*made);
    const hal_sim_kernel &kernel = *made->function.kernel;
    for (unsigned i = 0; wrong.empty() && i < kernel.count; i++) {
      if (!kernel.parameters[i].element) continue;
      void *address;
      memcpy(&address, made->given[i], sizeof address);
      const Buffer *buffer = memory::alive(address, 0);
      std::string out = buffer ? memory::trespass(*buffer) : "";
      if (!out.empty()) wrong = std::string(kernel.name) + ": somebody " + out;
    }
    return wrong;
  });
  return OK;
}
}  // namespace streams

const Chip *chosen(const char *runtime, const Chip *chips) {
  static const pid_t owner = getpid();
  if (getpid() != owner) return nullptr; /* forked: streams and memory are the parent's */
  const char *asked = getenv("HAL_SIM");
  size_t length = strlen(runtime);
  if (!asked || strncmp(asked, runtime, length) || asked[length] != ':') return nullptr;
  for (const Chip *chip = chips; chip->name; chip++)
    if (!strcmp(chip->name, asked + length + 1)) return chip;
  return nullptr;
}
}  // namespace sim
