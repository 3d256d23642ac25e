/* The simulator's parts, and what each may ask of the others.
 *
 *   memory.cpp   device memory: buffers with red zones, poison, handles for other processes
 *   modules.cpp  compiles kernels for the host and loads them
 *   groups.cpp   runs the work-items of a group in turns, wavefront by wavefront
 *   faults.cpp   what the processor refuses to do for a kernel or a copy becomes its failure
 *   checks.cpp   looks at every access of a kernel
 *   fences.cpp   looks at flags and fences between processes
 *   streams.cpp  queues of work, done when somebody waits, in an order drawn from a seed
 *   dialects/    one file a vendor: the C names of its runtime, and its chips
 */
#pragma once
#include <signal.h>
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"

namespace sim {

/* Numbers that the runtimes simulated here have in common. */
enum Error {
  OK = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_READY = 600,
  LAUNCH_FAILURE = 719,
};

/* Held by every call of a runtime; work runs under it too. */
extern std::recursive_mutex gate;

struct Chip {
  const char *name, *product;
  unsigned wavefront, local_bytes, processors, most_threads;
};
/* The chip of HAL_SIM=runtime:chip, or null; `chips` ends with one without a name. */
const Chip *chosen(const char *runtime, const Chip *chips);

/* What HAL_SIM_CHECK asks for now: words with commas between, or `all`. */
struct Checks {
  bool memory, races, uninitialised, order, streams, fences;
  bool eager;    /* HAL_SIM_EAGER=1: work is done as soon as it is queued */
  unsigned seed; /* HAL_SIM_SEED */
  bool accesses() const { return memory || races || uninitialised || streams || fences; }
};
Checks checks();

/* Who touched a byte last; `phase` counts the shuffles of his wavefront. */
struct Stamp {
  uint32_t op, group, epoch;
  uint16_t item, phase;
  uint8_t wave;
  bool items : 1, waves : 1, groups : 1; /* whether several did: items and wavefronts since the last barrier, groups ever */
};
/* The last of each kind of access: which of them a later one is at odds with depends on its own kind. */
struct Cell {
  Stamp write, read, update, load; /* the latter two are atomic */
  uint32_t written;                /* by which op, of local memory by which run of a group, it got its value; 0: by none */
};

/* How a byte of memory that processes share was stored last; kept in memory that they share too. */
struct Store {
  uint32_t process, op, group, epoch;
  uint32_t time; /* releases of its process before it */
  uint16_t item;
  uint8_t how; /* see fences.cpp; 0: nobody knows */
  bool joined : 1, chained : 1; /* released for more than its work-item alone, and for other processes too */
  int32_t file; /* the module it was done by, and the place there */
  uint32_t offset;
};

struct Buffer {
  char *base;
  size_t size;
  unsigned number;
  bool alive, peer;
  Cell *cells;   /* a byte each, made when first asked for */
  Store *stores; /* the same, of memory that processes share */
};
constexpr size_t RED_ZONE = 256;

namespace memory {
Error allocate(void **made, size_t size);
Error release(void *base);
/* The buffer that holds an address or to whose red zones it belongs, alive or not; null if none. */
Buffer *find(const void *address);
Buffer *alive(const void *address, size_t size);
/* Why the bytes around a buffer are not what they were, empty if they are. */
std::string trespass(const Buffer &buffer);
struct Handle {
  uint64_t magic;
  int32_t process, file, stores;
  uint64_t offset, size;
};
Error share(Handle *handle, const void *base);
Error open(void **mapped, const Handle &handle);
Error close(void *mapped);
size_t total();
size_t in_use();
}  // namespace memory

struct Array {
  std::string kernel, name;
  size_t offset, size;
};

struct Module {
  void *library = nullptr;
  int file = -1;
  const hal_sim_kernel *kernels = nullptr;
  std::vector<Array> arrays; /* of local memory, by offset within the thread's own block */
  void *(*here)() = nullptr; /* the address of a variable of the thread's block, which is at `anchor` */
  size_t anchor = 0, local_size = 0;
  bool checked = false;
  uintptr_t begin = 0, end = 0; /* where its own constants and code are */
};
struct Function {
  Module *module;
  const hal_sim_kernel *kernel;
};

namespace modules {
struct Compiled {
  bool done;
  std::string code, log;
};
/* Compile kernels in the words of words.h; with checks, every access of the kernels calls the engine. */
Compiled compile(const std::string &text, const std::string &name, const std::vector<std::string> &options);
Error load(Module **made, const void *image, size_t size);
Error unload(Module *module);
Error function(Function **made, Module *module, const char *name);
bool known(Function *function);
size_t image_size(const void *image);
/* `file:line` of an address within a module. */
std::string place(const Module &module, const void *address);
/* The same of a module of any process, and the kernel it belongs to; both are empty if that process is gone. */
struct Place {
  std::string line, kernel;
};
Place place(int process, int file, size_t offset);
size_t local_bytes(const Function &function);
}  // namespace modules

struct Op;
struct Launch {
  Function function;
  unsigned groups, threads;
  std::vector<char> bytes;
  std::vector<void *> given; /* into bytes */
  const Chip *chip;
  const Op *op = nullptr;
  Checks checks = {};
};
/* What modules are given. */
const hal_sim_engine *the_engine();
/* Empty, or what the kernel did wrong. */
std::string run(Launch &launch);

/* An item of a group as the checks see it. */
struct Worker;
struct Where {
  const Launch *launch;
  unsigned group, item;
  uint32_t epoch, serial; /* barriers passed by the group; groups run so far */
  const uint16_t *phases; /* shuffles of each wavefront */
  char *local;            /* the block of local memory of this thread */
  const char *stacks_begin, *stacks_end;
  std::vector<Cell> *local_cells;
};
namespace check {
/* Empty if an access is fine. */
std::string access(const Where &where, const void *address, size_t size, int kind, const void *from);
/* Once a load that acquires has brought its value. */
std::string acquired(const Where &where, const void *address, size_t size, const void *from);
/* The same for what a stream copies or, from null, fills. */
std::string copy(const Op &op, const void *to, const void *from, size_t size);
std::string work_item(const Where &where);
}  // namespace check

/* Memory that processes share; each of these says what is wrong, or nothing. */
namespace fences {
std::string access(const Where &where, Store *stores, const char *address, size_t size, int kind, const void *from);
std::string acquired(const Where &where, const Store *stores, const char *address);
/* An atomic load of memory that is this process's alone. */
void own(const Where &where, bool acquires);
void fence(const Where &where, int scope);
std::string copied_from(const Op &op, const Store *stores, size_t size);
void copied_to(Store *stores, size_t size);
void forget(const char *begin, const char *end);
}  // namespace fences

/* What the processor does not do for a kernel or a copy: signals of its own thread. */
namespace faults {
struct Fault {
  int signal;
  const char *address, *instruction;
};
/* While there is one, faults of kernels are theirs; all other signals are whose they were before. */
struct Watch {
  Watch();
  ~Watch();
};
/* False if some of it cannot be read or written. */
bool copied(void *to, const void *from, size_t size);
/* What signals of a thread are handled on while it runs kernels. */
constexpr size_t STACK = 64 << 10;
struct Stack {
  explicit Stack(char *base);
  ~Stack();
  stack_t before;
};
}  // namespace faults
namespace running {
/* Take note of a fault, and say on which stack to tell of it; null if this thread is in no kernel of that stack. */
char *caught(const faults::Fault &fault, const char *stack);
[[noreturn]] void tell();
}  // namespace running

struct Stream;
struct Event;
/* A piece of work of a stream. `clock` says, for each stream, how much of it is over before this begins. */
struct Op {
  unsigned number;
  std::string what;
  std::function<std::string(const Op &)> work;
  std::vector<unsigned> after;
  std::vector<unsigned> clock;
  unsigned stream, position;
};
namespace streams {
Stream *usual();
Error create(Stream **made, bool blocking);
Error destroy(Stream *stream);
bool known(Stream *stream);
void push(Stream *stream, std::string what, std::function<std::string(const Op &)> work);
/* Do all there is; what fails is told to who waits for its stream. */
void drain();
Error synchronize(Stream *stream);
Error synchronize_all();
Error query(Stream *stream);
Error create_event(Event **made);
Error destroy_event(Event *event);
Error record(Event *event, Stream *stream);
Error wait_for(Stream *stream, Event *event);
Error synchronize_event(Event *event);
Error query_event(Event *event);
Error elapsed(float *milliseconds, Event *from, Event *to);
Error copy(Stream *stream, void *to, const void *from, size_t size);
Error fill(Stream *stream, void *to, int value, size_t size);
Error launch(Stream *stream, Function *function, unsigned groups, unsigned threads, void **given, void **extra,
             const Chip *chip);
bool ordered(unsigned earlier, const Op &later);
std::string name(unsigned op);
}  // namespace streams

/* What the last piece of work that failed did wrong; an error's text brings it to whoever asks. */
const std::string &report();
void report(std::string text);
}  // namespace sim
