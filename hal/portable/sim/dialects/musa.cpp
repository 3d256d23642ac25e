/* MUSA's driver by its C names, over the simulator: HAL_SIM=musa:mp_22 says of which chip. */
#include <stdlib.h>
#include <string.h>

#include "../simulator.h"

#define API extern "C" __attribute__((visibility("default"))) int
/* A call of a driver that was started; most need a context too. */
#define STARTED                                            \
  std::lock_guard<std::recursive_mutex> lock(sim::gate);    \
  if (!started || !chip()) return NOT_INITIALIZED;
#define CALL STARTED if (!current) return INVALID_CONTEXT;

namespace {
using namespace sim;
const Chip CHIPS[] = {
    {"mp_21", "MTT S80", 128, 28 << 10, 5, 1024},
    {"mp_22", "MTT S4000", 128, 28 << 10, 5, 1024},
    {"mp_31", "MTT S5000", 32, 28 << 10, 5, 1024},
    {},
};
const Chip *chip() { return chosen("musa", CHIPS); }
bool started;
int context;
thread_local int *current; /* every thread has its own */
}  // namespace

API muInit(unsigned flags) {
  started = !flags && chip();
  return flags ? INVALID_VALUE : started ? OK : INVALID_DEVICE;
}
API muGetErrorName(int code, const char **name) {
  switch (code) {
    case INVALID_VALUE: *name = "MUSA_ERROR_INVALID_VALUE"; break;
    case OUT_OF_MEMORY: *name = "MUSA_ERROR_OUT_OF_MEMORY"; break;
    case NOT_INITIALIZED: *name = "MUSA_ERROR_NOT_INITIALIZED"; break;
    case INVALID_DEVICE: *name = "MUSA_ERROR_INVALID_DEVICE"; break;
    case INVALID_IMAGE: *name = "MUSA_ERROR_INVALID_IMAGE"; break;
    case INVALID_CONTEXT: *name = "MUSA_ERROR_INVALID_CONTEXT"; break;
    case INVALID_HANDLE: *name = "MUSA_ERROR_INVALID_HANDLE"; break;
    case NOT_FOUND: *name = "MUSA_ERROR_NOT_FOUND"; break;
    case NOT_READY: *name = "MUSA_ERROR_NOT_READY"; break;
    case LAUNCH_FAILURE: *name = "MUSA_ERROR_LAUNCH_FAILED"; break;
    default: return INVALID_VALUE;
  }
  return OK;
}
API muGetErrorString(int code, const char **text) {
  *text = report().c_str();
  return code == LAUNCH_FAILURE && !report().empty() ? OK : (Error)muGetErrorName(code, text);
}
API muDriverGetVersion(int *version) {
  *version = 40000;
  return OK;
}
API muDeviceGet(int *device, int number) {
  STARTED *device = number;
  return number ? INVALID_DEVICE : OK;
}
API muDeviceGetAttribute(int *value, int attribute, int device) {
  STARTED if (device) return INVALID_DEVICE;
  int version = atoi(chip()->name + 3);
  switch (attribute) {
    case 8: *value = (int)chip()->local_bytes; return OK;
    case 10: *value = (int)chip()->wavefront; return OK;
    case 16: *value = (int)chip()->processors; return OK;
    case 75: *value = version / 10; return OK;
    case 76: *value = version % 10; return OK;
    default: return INVALID_VALUE;
  }
}
API muDevicePrimaryCtxRetain(int **made, int device) {
  STARTED *made = &context;
  return device ? INVALID_DEVICE : OK;
}
API muCtxSetCurrent(int *given) {
  if (given != &context) return INVALID_CONTEXT;
  current = given;
  return OK;
}

API muMemAlloc_v2(void **made, size_t size) {
  CALL return size ? memory::allocate(made, size) : INVALID_VALUE;
}
API muMemFree_v2(void *base) {
  CALL streams::drain();
  return memory::release(base);
}
API muMemGetInfo_v2(size_t *free, size_t *total) {
  CALL *total = memory::total();
  *free = *total - memory::in_use();
  return OK;
}
API muMemsetD8_v2(void *to, unsigned char value, size_t size) {
  CALL int refused = streams::fill(nullptr, to, value, size);
  return refused ? refused : streams::synchronize(nullptr);
}
API muMemGetAddressRange_v2(void **base, size_t *size, void *address) {
  CALL Buffer *found = memory::alive(address, 0);
  if (!found) return INVALID_VALUE;
  *base = found->base, *size = found->size;
  return OK;
}

struct IpcHandle {
  char bytes[64];
};
API muIpcGetMemHandle(memory::Handle *handle, void *base) {
  CALL return memory::share(handle, base);
}
API muIpcOpenMemHandle_v2(void **mapped, IpcHandle handle, unsigned flags) {
  CALL memory::Handle of;
  memcpy(&of, handle.bytes, sizeof of);
  return flags == 1 ? memory::open(mapped, of) : INVALID_VALUE;
}
API muIpcCloseMemHandle(void *mapped) {
  CALL streams::drain();
  return memory::close(mapped);
}

API muModuleLoadData(Module **made, const void *image) {
  CALL return modules::load(made, image, modules::image_size(image));
}
API muModuleGetFunction(Function **made, Module *module, const char *name) {
  CALL return modules::function(made, module, name);
}
API muLaunchKernel(Function *function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned block, unsigned block_y,
                   unsigned block_z, unsigned shared, Stream *stream, void **given, void **extra) {
  CALL if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared || extra) return INVALID_VALUE;
  return streams::launch(stream, function, grid, block, given, nullptr, chip());
}

API muStreamSynchronize(Stream *stream) {
  CALL return streams::synchronize(stream);
}
API muEventCreate(Event **made, unsigned) {
  CALL return streams::create_event(made);
}
API muEventRecord(Event *event, Stream *stream) {
  CALL return streams::record(event, stream);
}
API muEventSynchronize(Event *event) {
  CALL return streams::synchronize_event(event);
}
API muEventElapsedTime(float *milliseconds, Event *from, Event *to) {
  CALL return streams::elapsed(milliseconds, from, to);
}
API muEventDestroy_v2(Event *event) {
  CALL return streams::destroy_event(event);
}
