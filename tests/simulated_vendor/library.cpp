/* A vendor's driver API, runtime API and run-time compiler in one library: the device is the host, names begin with NAME.
 *
 * Kernels are of the dialect "host", compiled by the script `compiler` beside this file.
 */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <string>

#define JOINED(a, b) a##b
#define WITH(name, rest) JOINED(name, rest)
#define API(name) extern "C" int WITH(NAME, name)
#define TEXT(name) extern "C" const char *WITH(NAME, name)

enum { SUCCESS, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
static bool ready;
static thread_local bool entered; /* a thread has no context before it takes one */

struct Function {
  void (*call)(void **);
  int (*run)(void (*)(void **), void **, int, int, int, int *);
};
struct Event {
  double at;
};
struct Program {
  std::string text, log, code;
};

static const char *words(int code) { return code == NOT_FOUND ? "NOT_FOUND" : code == INVALID_DEVICE ? "INVALID_DEVICE" : "REFUSED"; }

/* The driver API. */
API(Init)(unsigned flags) { return ready = !flags, flags ? INVALID_VALUE : SUCCESS; }
API(GetErrorName)(int code, const char **name) { return *name = words(code), SUCCESS; }
API(DriverGetVersion)(int *version) { return *version = 7, SUCCESS; }
API(DeviceGet)(int *device, int number) { return *device = number, !ready ? NOT_INITIALIZED : number ? INVALID_DEVICE : SUCCESS; }
API(DevicePrimaryCtxRetain)(void **context, int) { return *context = &ready, SUCCESS; }
API(CtxSetCurrent)(void *context) { return entered = context == &ready, entered ? SUCCESS : INVALID_VALUE; }

/* The runtime API. */
TEXT(GetErrorString)(int code) { return words(code); }
API(RuntimeGetVersion)(int *version) { return *version = 8, SUCCESS; }
API(SetDevice)(int number) { return ready = true, number ? INVALID_DEVICE : SUCCESS; }
API(DeviceGetName)(char *name, int size, int) { return strncpy(name, "chip", size), SUCCESS; }

/* Both, with either one's numbers of attributes. */
API(DeviceGetAttribute)(int *value, int attribute, int) {
  switch (attribute) {
    case 75: case 76: return *value = 1, SUCCESS;
    case 16: case 63: return *value = 2, SUCCESS;
    case 8: case 74: return *value = 48 << 10, SUCCESS;
    case 10: case 87: return *value = 32, SUCCESS;
    default: return INVALID_VALUE;
  }
}
API(ModuleLoadData)(void **module, const void *image) {
  if (!ready) return NOT_INITIALIZED;
  size_t size;
  memcpy(&size, image, sizeof size);
  char path[] = "/tmp/simulated-vendor-XXXXXX";
  int file = mkstemp(path);
  bool written = file >= 0 && write(file, (const char *)image + sizeof size, size) == (ssize_t)size;
  if (file >= 0) close(file);
  *module = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
  unlink(path);
  return *module ? SUCCESS : INVALID_IMAGE;
}
API(ModuleGetFunction)(Function **function, void *module, const char *name) {
  void *call = dlsym(module, (std::string("call_") + name).c_str()), *run = dlsym(module, "hal_host_run");
  if (!call || !run) return NOT_FOUND;
  *function = new Function{(void (*)(void **))call, (int (*)(void (*)(void **), void **, int, int, int, int *))run};
  return SUCCESS;
}
static int launch(Function *function, unsigned grid, unsigned block, unsigned shared, void *stream, void **arguments) {
  int parted[2];
  if (!grid || !block || block > 1024 || shared || stream) return INVALID_VALUE;
  return function->run(function->call, arguments, grid, block, 32, parted) ? INVALID_VALUE : SUCCESS;
}
API(LaunchKernel)(Function *f, unsigned x, unsigned, unsigned, unsigned b, unsigned, unsigned, unsigned shared, void *stream, void **given, void **) {
  return entered ? launch(f, x, b, shared, stream, given) : INVALID_CONTEXT;
}
API(ModuleLaunchKernel)(Function *f, unsigned x, unsigned, unsigned, unsigned b, unsigned, unsigned, unsigned shared, void *stream, void **given, void **) {
  return launch(f, x, b, shared, stream, given);
}
API(StreamSynchronize)(void *stream) { return stream ? INVALID_VALUE : SUCCESS; }
API(EventCreate)(Event **event, unsigned) { return *event = new Event{-1}, SUCCESS; }
API(EventCreateWithFlags)(Event **event, unsigned) { return *event = new Event{-1}, SUCCESS; }
API(EventRecord)(Event *event, void *) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return event->at = now.tv_sec * 1e3 + now.tv_nsec * 1e-6, SUCCESS;
}
API(EventElapsedTime)(float *milliseconds, Event *from, Event *to) {
  if (from->at < 0 || to->at < 0) return INVALID_VALUE;
  return *milliseconds = (float)(to->at - from->at), SUCCESS;
}
API(EventDestroy)(Event *event) { return delete event, SUCCESS; }
API(EventDestroy_v2)(Event *event) { return delete event, SUCCESS; }

/* The run-time compiler. */
static std::string read(const std::string &path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}
TEXT(rtcGetErrorString)(int code) { return words(code); }
API(rtcVersion)(int *major, int *minor) { return *major = 1, *minor = 2, SUCCESS; }
API(rtcCreateProgram)(Program **program, const char *text, const char *, int, const char **, const char **) {
  return *program = new Program{text}, SUCCESS;
}
API(rtcCompileProgram)(Program *program, int, const char **) {
  char folder[] = "/tmp/simulated-vendor-XXXXXX";
  if (!mkdtemp(folder)) return INVALID_VALUE;
  std::string at = folder;
  std::ofstream(at + "/kernels.cu") << program->text;
  std::string line = std::string(COMPILER) + " -o " + at + "/code " + at + "/kernels.cu 2> " + at + "/log";
  int failed = system(line.c_str());
  program->log = read(at + "/log"), program->code = read(at + "/code");
  for (const char *name : {"/kernels.cu", "/log", "/code"}) unlink((at + name).c_str());
  rmdir(folder);
  return failed ? INVALID_VALUE : SUCCESS;
}
API(rtcGetProgramLogSize)(Program *program, size_t *size) { return *size = program->log.size(), SUCCESS; }
API(rtcGetProgramLog)(Program *program, char *to) { return memcpy(to, program->log.data(), program->log.size()), SUCCESS; }
API(rtcGetCodeSize)(Program *program, size_t *size) { return *size = program->code.size(), SUCCESS; }
API(rtcGetCode)(Program *program, char *to) { return memcpy(to, program->code.data(), program->code.size()), SUCCESS; }
API(rtcDestroyProgram)(Program **program) { return delete *program, SUCCESS; }
