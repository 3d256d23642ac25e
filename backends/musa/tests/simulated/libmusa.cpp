/* A MUSA driver with one device, which is the host. Its architecture is SIMULATED_MUSA, 22 if unset.
 *
 * It does what it is told at once, and refuses what a driver would: calls before muInit or without a context, handles
 * that are none, code that is none.
 */
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <map>
#include <set>
#include <string>

namespace {
enum { SUCCESS, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201 };
enum { INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

struct Function {
  void (*call)(void **);
  int (*run)(void (*)(void **), void **, int, int, int, int *);
};
struct Event {
  double at;
};

/* Memory is a file without a name, which another process finds among those of the process that made it. */
struct Memory {
  int file; /* -1: of another process */
  size_t size;
};
struct Shared {
  char magic[8];
  int process, file;
  uint64_t size, inode;
  char rest[32];
};
static_assert(sizeof(Shared) == 64);
const char MAGIC[8] = {'M', 'U', 'S', 'A', 'I', 'P', 'C', 0};

std::map<char *, Memory> memories;

bool initialized;
int context, *current;
std::set<void *> modules;
std::set<Event *> events;

int architecture() {
  const char *chosen = getenv("SIMULATED_MUSA");
  return chosen ? atoi(chosen) : 22;
}
int subgroup() { return architecture() <= 22 ? 128 : 32; }
int refusal() { return !initialized ? NOT_INITIALIZED : !current ? INVALID_CONTEXT : SUCCESS; }

size_t length(const Elf64_Ehdr *image) { return image->e_shoff + (size_t)image->e_shentsize * image->e_shnum; }
}  // namespace

extern "C" {
int muInit(unsigned flags) {
  if (flags) return INVALID_VALUE;
  initialized = true;
  return SUCCESS;
}

int muGetErrorName(int code, const char **name) {
  switch (code) {
    case INVALID_VALUE: *name = "MUSA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "MUSA_ERROR_OUT_OF_MEMORY"; break;
    case NOT_INITIALIZED: *name = "MUSA_ERROR_NOT_INITIALIZED"; break;
    case INVALID_DEVICE: *name = "MUSA_ERROR_INVALID_DEVICE"; break;
    case INVALID_IMAGE: *name = "MUSA_ERROR_INVALID_IMAGE"; break;
    case INVALID_CONTEXT: *name = "MUSA_ERROR_INVALID_CONTEXT"; break;
    case INVALID_HANDLE: *name = "MUSA_ERROR_INVALID_HANDLE"; break;
    case NOT_FOUND: *name = "MUSA_ERROR_NOT_FOUND"; break;
    case LAUNCH_FAILED: *name = "MUSA_ERROR_LAUNCH_FAILED"; break;
    default: return INVALID_VALUE;
  }
  return SUCCESS;
}

int muDriverGetVersion(int *version) {
  *version = 40000;
  return SUCCESS;
}

int muDeviceGet(int *device, int number) {
  if (!initialized) return NOT_INITIALIZED;
  *device = number;
  return number == 0 ? SUCCESS : INVALID_DEVICE;
}

int muDeviceGetAttribute(int *value, int attribute, int device) {
  if (!initialized || device) return !initialized ? NOT_INITIALIZED : INVALID_DEVICE;
  switch (attribute) {
    case 8: *value = 28 << 10; return SUCCESS;
    case 10: *value = subgroup(); return SUCCESS;
    case 16: *value = 5; return SUCCESS;
    case 75: *value = architecture() / 10; return SUCCESS;
    case 76: *value = architecture() % 10; return SUCCESS;
    default: return INVALID_VALUE;
  }
}

int muDevicePrimaryCtxRetain(int **made, int device) {
  if (!initialized || device) return !initialized ? NOT_INITIALIZED : INVALID_DEVICE;
  *made = &context;
  return SUCCESS;
}

int muCtxSetCurrent(int *given) {
  if (given != &context) return INVALID_CONTEXT;
  current = given;
  return SUCCESS;
}

int muModuleLoadData(void **module, const void *image) {
  if (refusal()) return refusal();
  if (memcmp(image, ELFMAG, SELFMAG)) return INVALID_IMAGE;
  char path[] = "/tmp/simulated-musa-XXXXXX";
  int file = mkstemp(path);
  size_t size = length((const Elf64_Ehdr *)image);
  bool written = file >= 0 && write(file, image, size) == (ssize_t)size;
  if (file >= 0) close(file);
  *module = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  unlink(path);
  if (!*module) return INVALID_IMAGE;
  modules.insert(*module);
  return SUCCESS;
}

int muModuleGetFunction(Function **function, void *module, const char *name) {
  if (refusal()) return refusal();
  if (!modules.count(module)) return INVALID_HANDLE;
  void *call = dlsym(module, (std::string("call_") + name).c_str()), *run = dlsym(module, "hal_host_run");
  if (!call || !run) return NOT_FOUND;
  *function = new Function{(void (*)(void **))call, (int (*)(void (*)(void **), void **, int, int, int, int *))run};
  return SUCCESS;
}

int muLaunchKernel(Function *function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block,
                   unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **arguments, void **extra) {
  if (refusal()) return refusal();
  if (!grid || !block || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || block > 1024) return INVALID_VALUE;
  if (shared || extra || stream) return INVALID_VALUE;
  int parted[2];
  return function->run(function->call, arguments, grid, block, subgroup(), parted) ? LAUNCH_FAILED : SUCCESS;
}

int muMemAlloc_v2(char **made, size_t size) {
  if (refusal()) return refusal();
  if (!size) return INVALID_VALUE;
  int file = memfd_create("simulated-musa", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, (off_t)size)) return OUT_OF_MEMORY;
  void *at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (at == MAP_FAILED) return OUT_OF_MEMORY;
  memories[*made = (char *)at] = {file, size};
  memset(at, 0x5a, size); /* whoever counts on zeros is to notice */
  return SUCCESS;
}

int muMemFree_v2(char *at) {
  auto found = memories.find(at);
  if (found == memories.end() || found->second.file < 0) return INVALID_VALUE;
  munmap(at, found->second.size);
  close(found->second.file);
  memories.erase(found);
  return SUCCESS;
}

int muMemsetD8_v2(char *at, unsigned char value, size_t size) {
  auto found = memories.find(at);
  if (found == memories.end() || size > found->second.size) return INVALID_VALUE;
  memset(at, value, size);
  return SUCCESS;
}

int muMemGetAddressRange_v2(char **base, size_t *size, char *at) {
  auto found = memories.find(at);
  if (found == memories.end()) return INVALID_VALUE;
  *base = at;
  *size = found->second.size;
  return SUCCESS;
}

int muIpcGetMemHandle(Shared *made, char *at) {
  auto found = memories.find(at);
  struct stat known;
  if (found == memories.end() || found->second.file < 0 || fstat(found->second.file, &known)) return INVALID_VALUE;
  *made = {{}, getpid(), found->second.file, found->second.size, known.st_ino, {}};
  memcpy(made->magic, MAGIC, sizeof MAGIC);
  return SUCCESS;
}

/* As of a real driver: not in the process that made the memory, and only while that lives. */
int muIpcOpenMemHandle_v2(char **opened, Shared handle, unsigned flags) {
  if (refusal()) return refusal();
  if (memcmp(handle.magic, MAGIC, sizeof MAGIC) || flags != 1 || handle.process == getpid()) return INVALID_VALUE;
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
  int file = open(path, O_RDWR | O_CLOEXEC);
  struct stat known;
  bool same = file >= 0 && !fstat(file, &known) && known.st_ino == handle.inode && (uint64_t)known.st_size == handle.size;
  void *at = same ? mmap(nullptr, handle.size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
  if (file >= 0) close(file);
  if (at == MAP_FAILED) return INVALID_HANDLE;
  memories[*opened = (char *)at] = {-1, handle.size};
  return SUCCESS;
}

int muIpcCloseMemHandle(char *at) {
  auto found = memories.find(at);
  if (found == memories.end() || found->second.file >= 0) return INVALID_VALUE;
  munmap(at, found->second.size);
  memories.erase(found);
  return SUCCESS;
}

int muStreamSynchronize(void *stream) { return refusal() ? refusal() : stream ? INVALID_HANDLE : SUCCESS; }

int muEventCreate(Event **event, unsigned) {
  if (refusal()) return refusal();
  events.insert(*event = new Event{-1});
  return SUCCESS;
}

int muEventRecord(Event *event, void *stream) {
  if (stream || !events.count(event)) return INVALID_HANDLE;
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  event->at = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
  return SUCCESS;
}

int muEventElapsedTime(float *milliseconds, Event *from, Event *to) {
  if (!events.count(from) || !events.count(to) || from->at < 0 || to->at < 0) return INVALID_HANDLE;
  *milliseconds = (float)(to->at - from->at);
  return SUCCESS;
}

int muEventDestroy_v2(Event *event) {
  if (!events.erase(event)) return INVALID_HANDLE;
  delete event;
  return SUCCESS;
}
}
