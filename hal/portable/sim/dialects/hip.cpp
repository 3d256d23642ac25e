/* HIP's runtime and its run-time compiler, by their C names, over the simulator: HAL_SIM=hip:gfx942 says of which chip. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../simulator.h"

#define API extern "C" __attribute__((visibility("default"))) int
#define TEXT extern "C" __attribute__((visibility("default"))) const char *
/* A call when there is no device, or in a child of the process that had it, finds none. */
#define CALL                                                \
  std::lock_guard<std::recursive_mutex> lock(sim::gate);     \
  if (!chip()) return NO_DEVICE;

namespace {
using namespace sim;
enum { NO_DEVICE = 100, ILLEGAL_ADDRESS = 700 };

const Chip CHIPS[] = {
    {"gfx906", "AMD Instinct MI50", 64, 64 << 10, 4, 1024},
    {"gfx90a", "AMD Instinct MI210", 64, 64 << 10, 4, 1024},
    {"gfx942", "AMD Instinct MI300X", 64, 64 << 10, 4, 1024},
    {"gfx950", "AMD Instinct MI350X", 64, 160 << 10, 4, 1024},
    {"gfx1100", "AMD Radeon RX 7900", 32, 64 << 10, 4, 1024},
    {"gfx926", "Hygon DCU gfx926", 64, 64 << 10, 4, 1024},
    {"gfx928", "Hygon DCU gfx928", 64, 64 << 10, 4, 1024},
    {"gfx936", "Hygon DCU gfx936", 64, 64 << 10, 4, 1024},
    {},
};
const Chip *chip() { return chosen("hip", CHIPS); }

struct Program {
  std::string text, name, log, code;
};
}  // namespace

API hipInit(unsigned flags) {
  CALL return flags ? INVALID_VALUE : OK;
}
API hipDriverGetVersion(int *version) {
  *version = 60000000;
  return OK;
}
API hipRuntimeGetVersion(int *version) { return hipDriverGetVersion(version); }
API hipGetDeviceCount(int *count) {
  *count = 0;
  CALL *count = 1;
  return OK;
}
API hipSetDevice(int device) {
  CALL return device ? INVALID_DEVICE : OK;
}
API hipGetDevice(int *device) {
  CALL *device = 0;
  return OK;
}
API hipDeviceSynchronize() {
  CALL return streams::synchronize_all();
}

/* As of HIP 6: its size, and where in it is what we tell. */
API hipGetDevicePropertiesR0600(char *properties, int device) {
  CALL if (device) return INVALID_DEVICE;
  memset(properties, 0, 1472);
  auto number = [&](size_t offset, int value) { memcpy(properties + offset, &value, sizeof value); };
  auto size = [&](size_t offset, size_t value) { memcpy(properties + offset, &value, sizeof value); };
  snprintf(properties, 256, "%s (simulated)", chip()->product);
  size(288, memory::total());
  size(296, chip()->local_bytes);
  number(308, (int)chip()->wavefront);
  number(320, (int)chip()->most_threads);
  number(388, (int)chip()->processors);
  size(640, chip()->local_bytes);
  snprintf(properties + 1160, 256, "%s", chip()->name);
  return OK;
}
API hipDeviceGetName(char *name, int size, int device) {
  CALL if (device || size < 1) return device ? INVALID_DEVICE : INVALID_VALUE;
  snprintf(name, size, "%s (simulated)", chip()->product);
  return OK;
}
API hipDeviceGetAttribute(int *value, int attribute, int device) {
  CALL if (device) return INVALID_DEVICE;
  switch (attribute) {
    case 63: *value = (int)chip()->processors; return OK;
    case 74: *value = (int)chip()->local_bytes; return OK;
    case 87: *value = (int)chip()->wavefront; return OK;
    default: return INVALID_VALUE;
  }
}

API hipMalloc(void **made, size_t size) {
  CALL *made = nullptr;
  return size ? memory::allocate(made, size) : OK;
}
API hipFree(void *base) {
  CALL if (!base) return OK;
  streams::drain();
  return memory::release(base);
}
API hipMemGetInfo(size_t *free, size_t *total) {
  CALL *total = memory::total();
  *free = *total - memory::in_use();
  return OK;
}
API hipMemcpyAsync(void *to, const void *from, size_t size, int, Stream *stream) {
  CALL return streams::copy(stream, to, from, size);
}
API hipMemcpy(void *to, const void *from, size_t size, int) {
  CALL int refused = streams::copy(nullptr, to, from, size);
  return refused ? refused : streams::synchronize(nullptr);
}
API hipMemsetAsync(void *to, int value, size_t size, Stream *stream) {
  CALL return streams::fill(stream, to, value, size);
}
API hipMemset(void *to, int value, size_t size) {
  CALL int refused = streams::fill(nullptr, to, (unsigned char)value, size);
  return refused ? refused : streams::synchronize(nullptr);
}

API hipStreamCreateWithFlags(Stream **made, unsigned flags) {
  CALL return flags > 1 ? INVALID_VALUE : streams::create(made, flags == 0);
}
API hipStreamCreate(Stream **made) { return hipStreamCreateWithFlags(made, 0); }
API hipStreamDestroy(Stream *stream) {
  CALL return streams::destroy(stream);
}
API hipStreamSynchronize(Stream *stream) {
  CALL return streams::synchronize(stream);
}
API hipStreamQuery(Stream *stream) {
  CALL return streams::query(stream);
}
API hipStreamWaitEvent(Stream *stream, Event *event, unsigned) {
  CALL return streams::wait_for(stream, event);
}

API hipEventCreateWithFlags(Event **made, unsigned) {
  CALL return streams::create_event(made);
}
API hipEventCreate(Event **made) { return hipEventCreateWithFlags(made, 0); }
API hipEventDestroy(Event *event) {
  CALL return streams::destroy_event(event);
}
API hipEventRecord(Event *event, Stream *stream) {
  CALL return streams::record(event, stream);
}
API hipEventSynchronize(Event *event) {
  CALL return streams::synchronize_event(event);
}
API hipEventQuery(Event *event) {
  CALL return streams::query_event(event);
}
API hipEventElapsedTime(float *milliseconds, Event *from, Event *to) {
  CALL return streams::elapsed(milliseconds, from, to);
}

API hipModuleLoadData(Module **made, const void *image) {
  CALL return modules::load(made, image, modules::image_size(image));
}
API hipModuleUnload(Module *module) {
  CALL streams::drain();
  return modules::unload(module);
}
API hipModuleGetFunction(Function **made, Module *module, const char *name) {
  CALL return modules::function(made, module, name);
}
API hipModuleLaunchKernel(Function *function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block,
                          unsigned block_y, unsigned block_z, unsigned shared, Stream *stream, void **given, void **extra) {
  CALL if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared) return INVALID_VALUE;
  return streams::launch(stream, function, grid, block, given, extra, chip());
}

API hipIpcGetMemHandle(memory::Handle *handle, void *base) {
  static_assert(sizeof(memory::Handle) <= 64, "as large as the runtime's");
  CALL return memory::share(handle, base);
}
struct IpcHandle {
  char bytes[64];
};
API hipIpcOpenMemHandle(void **mapped, IpcHandle handle, unsigned) {
  CALL memory::Handle of;
  memcpy(&of, handle.bytes, sizeof of);
  return memory::open(mapped, of);
}
API hipIpcCloseMemHandle(void *mapped) {
  CALL streams::drain();
  return memory::close(mapped);
}

TEXT hipGetErrorName(int code) {
  switch (code) {
    case OK: return "hipSuccess";
    case INVALID_VALUE: return "hipErrorInvalidValue";
    case OUT_OF_MEMORY: return "hipErrorOutOfMemory";
    case NOT_INITIALIZED: return "hipErrorNotInitialized";
    case NO_DEVICE: return "hipErrorNoDevice";
    case INVALID_DEVICE: return "hipErrorInvalidDevice";
    case INVALID_IMAGE: return "hipErrorInvalidImage";
    case INVALID_CONTEXT: return "hipErrorInvalidContext";
    case INVALID_HANDLE: return "hipErrorInvalidHandle";
    case NOT_FOUND: return "hipErrorNotFound";
    case NOT_READY: return "hipErrorNotReady";
    case LAUNCH_FAILURE: return "hipErrorLaunchFailure";
    default: return "hipErrorUnknown";
  }
}
/* What a kernel did wrong is told in full, and why code does not load. */
TEXT hipGetErrorString(int code) {
  static thread_local std::string text;
  bool told = (code == LAUNCH_FAILURE || code == INVALID_IMAGE) && !report().empty();
  text = told ? report() : hipGetErrorName(code);
  return text.c_str();
}

enum { RTC_SUCCESS = 0, RTC_INVALID_INPUT = 3, RTC_INVALID_OPTION = 5, RTC_COMPILATION = 6 };

TEXT hiprtcGetErrorString(int code) {
  switch (code) {
    case RTC_SUCCESS: return "HIPRTC_SUCCESS";
    case RTC_INVALID_INPUT: return "HIPRTC_ERROR_INVALID_INPUT";
    case RTC_INVALID_OPTION: return "HIPRTC_ERROR_INVALID_OPTION";
    case RTC_COMPILATION: return "HIPRTC_ERROR_COMPILATION";
    default: return "HIPRTC_ERROR_INTERNAL_ERROR";
  }
}
API hiprtcVersion(int *major, int *minor) {
  *major = 6, *minor = 0;
  return RTC_SUCCESS;
}
API hiprtcCreateProgram(Program **made, const char *text, const char *name, int headers, const char **, const char **) {
  if (!text || headers) return RTC_INVALID_INPUT;
  *made = new Program{text, name ? name : "kernels", "", ""};
  return RTC_SUCCESS;
}
API hiprtcDestroyProgram(Program **program) {
  delete *program;
  *program = nullptr;
  return RTC_SUCCESS;
}
API hiprtcCompileProgram(Program *program, int count, const char **options) {
  std::vector<std::string> passed;
  for (int i = 0; i < count; i++) {
    std::string option = options[i], value = option.substr(option.find('=') + 1);
    bool arch = !option.rfind("--gpu-architecture=", 0) || !option.rfind("--offload-arch=", 0);
    const Chip *known = CHIPS;
    while (arch && known->name && known->name != value.substr(0, value.find(':'))) known++;
    if (arch && !known->name) {
      program->log = "no such architecture: " + value + "\n";
      return RTC_COMPILATION;
    }
    if (!option.rfind("-D", 0) || !option.rfind("-I", 0))
      passed.push_back(option);
    else if (!arch && option.rfind("-std=", 0) && option.rfind("-O", 0) && option.rfind("-f", 0) && option.rfind("-m", 0)) {
      program->log = "unknown option: " + option + "\n";
      return RTC_INVALID_OPTION;
    }
  }
  modules::Compiled made = modules::compile(program->text, program->name, passed);
  program->log = made.log, program->code = made.code;
  return made.done ? RTC_SUCCESS : RTC_COMPILATION;
}
API hiprtcGetProgramLogSize(Program *program, size_t *size) {
  *size = program->log.size() + 1;
  return RTC_SUCCESS;
}
API hiprtcGetProgramLog(Program *program, char *log) {
  memcpy(log, program->log.c_str(), program->log.size() + 1);
  return RTC_SUCCESS;
}
API hiprtcGetCodeSize(Program *program, size_t *size) {
  *size = program->code.size();
  return program->code.empty() ? RTC_INVALID_INPUT : RTC_SUCCESS;
}
API hiprtcGetCode(Program *program, char *code) {
  memcpy(code, program->code.data(), program->code.size());
  return RTC_SUCCESS;
}
