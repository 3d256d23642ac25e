/* Device memory: an area of one file in memory, so that other processes can map parts of it.
 *
 * A buffer lies between red zones. It is poison (NaN, whatever is read) until something is written; what was freed is
 * not given out again for as long as possible, and known to have been freed.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "simulator.h"

namespace sim::memory {
namespace {
constexpr size_t AREA = size_t(1) << 40, PAGE = 4096;
constexpr uint64_t MAGIC = 0x68616c2d73696d32;
constexpr int POISON = 0xff, RED = 0xa5;

char *area, *cursor;
int file = -1, stores = -1; /* of its bytes, and of how they were stored */
size_t used;
unsigned count;
std::map<char *, Buffer> buffers; /* by base; freed ones too */

bool there() {
  if (area) return true;
  file = memfd_create("device memory", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, AREA)) return false;
  stores = memfd_create("stores", MFD_CLOEXEC);
  if (stores < 0 || ftruncate(stores, AREA * sizeof(Store))) return false;
  void *mapped = mmap(nullptr, AREA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (mapped == MAP_FAILED) return false;
  cursor = area = (char *)mapped;
  return true;
}

char *begin(const Buffer &buffer) { return buffer.base - PAGE; }
char *end(const Buffer &buffer) { return buffer.base + (buffer.size + RED_ZONE + PAGE - 1) / PAGE * PAGE; }

off_t stores_at(uint64_t offset) { return (off_t)(offset * sizeof(Store)); }

void forget_cells(Buffer &buffer) {
  if (buffer.cells) munmap(buffer.cells, buffer.size * sizeof(Cell));
  buffer.cells = nullptr;
  if (buffer.stores) {
    munmap(buffer.stores, buffer.size * sizeof(Store));
    fences::forget(buffer.base, buffer.base + buffer.size);
    off_t at = stores_at(buffer.base - area), size = (off_t)(buffer.size * sizeof(Store));
    if (!buffer.peer) fallocate(stores, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, size);
  }
  buffer.stores = nullptr;
}

/* How bytes of memory that is shared were stored, kept in a file of their owner's; null if there is no room for it. */
Store *shared_stores(int in, uint64_t offset, size_t size) {
  int flags = MAP_SHARED | MAP_NORESERVE;
  void *made = mmap(nullptr, size * sizeof(Store), PROT_READ | PROT_WRITE, flags, in, stores_at(offset));
  return made == MAP_FAILED ? nullptr : (Store *)made;
}

/* The first place from `from` on with room for so much, freed buffers there forgotten; null if there is none. */
char *room(char *from, size_t size) {
  for (char *at = from; at + size <= area + AREA;) {
    bool moved = false;
    auto next = buffers.lower_bound(at);
    if (next != buffers.begin()) --next;
    for (; next != buffers.end() && begin(next->second) < at + size;) {
      if (next->second.peer || end(next->second) <= at) {
        ++next;
      } else if (next->second.alive) {
        at = end(next->second), moved = true;
        break;
      } else {
        next = buffers.erase(next);
      }
    }
    if (!moved) return at;
  }
  return nullptr;
}
/* A file of another process. */
int theirs(int process, int number) {
  std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(number);
  return ::open(path.c_str(), O_RDWR | O_CLOEXEC);
}

}  // namespace

/* Of what is given out everything is written to, so it is much less than the address space. */
size_t total() {
  size_t half = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / 2;
  return half < size_t(2) << 30 ? half : size_t(2) << 30;
}
size_t in_use() { return used; }

Error allocate(void **made, size_t size) {
  if (size > total() - used || !there()) return OUT_OF_MEMORY;
  size_t whole = PAGE + (size + RED_ZONE + PAGE - 1) / PAGE * PAGE;
  char *at = room(cursor, whole);
  if (!at) at = room(area, whole);
  if (!at) return OUT_OF_MEMORY;
  cursor = at + whole;
  Buffer buffer{at + PAGE, size, ++count, true, false, nullptr, nullptr};
  memset(buffer.base - RED_ZONE, RED, RED_ZONE);
  memset(buffer.base, POISON, size);
  memset(buffer.base + size, RED, RED_ZONE);
  buffers[buffer.base] = buffer;
  used += size;
  *made = buffer.base;
  return OK;
}

Error release(void *base) {
  auto found = buffers.find((char *)base);
  if (found == buffers.end() || !found->second.alive || found->second.peer) return INVALID_VALUE;
  Buffer &buffer = found->second;
  buffer.alive = false;
  used -= buffer.size;
  forget_cells(buffer);
  madvise(begin(buffer), end(buffer) - begin(buffer), MADV_REMOVE);
  if (!checks().memory) buffers.erase(found);
  return OK;
}

Buffer *find(const void *address) {
  char *at = (char *)address;
  auto next = buffers.upper_bound(at);
  /* Between two buffers: the one it is nearer to. */
  if (next != buffers.begin()) {
    Buffer &before = std::prev(next)->second;
    if (at < before.base + before.size) return &before;
    bool after_is_near = next != buffers.end() && begin(next->second) <= at;
    if (!after_is_near && at < end(before)) return &before;
  }
  return next != buffers.end() && begin(next->second) <= at ? &next->second : nullptr;
}

Buffer *alive(const void *address, size_t size) {
  Buffer *found = find(address);
  char *at = (char *)address;
  char *end = found ? found->base + found->size : nullptr;
  bool within = found && found->alive && at >= found->base && at <= end && size <= (size_t)(end - at);
  return within ? found : nullptr;
}

std::string trespass(const Buffer &buffer) {
  if (buffer.peer) return "";
  for (size_t i = 0; i < RED_ZONE; i++) {
    if ((unsigned char)buffer.base[buffer.size + i] != RED)
      return "wrote " + std::to_string(i) + " bytes past the end of a buffer of " + std::to_string(buffer.size) + " bytes";
    if ((unsigned char)buffer.base[-1 - (ptrdiff_t)i] != RED)
      return "wrote " + std::to_string(i + 1) + " bytes before a buffer of " + std::to_string(buffer.size) + " bytes";
  }
  return "";
}

Error share(Handle *handle, const void *base) {
  Buffer *found = alive(base, 0);
  if (!found || found->base != base || found->peer) return INVALID_VALUE;
  uint64_t offset = (uint64_t)(found->base - area);
  if (!found->stores) found->stores = shared_stores(stores, offset, found->size);
  *handle = {MAGIC, getpid(), file, stores, offset, found->size};
  return OK;
}

Error open(void **mapped, const Handle &handle) {
  if (handle.magic != MAGIC || handle.process == getpid()) return INVALID_VALUE;
  int bytes = theirs(handle.process, handle.file), how = theirs(handle.process, handle.stores);
  void *at = MAP_FAILED;
  if (bytes >= 0) at = mmap(nullptr, handle.size, PROT_READ | PROT_WRITE, MAP_SHARED, bytes, (off_t)handle.offset);
  Store *kept = how >= 0 ? shared_stores(how, handle.offset, handle.size) : nullptr;
  for (int one : {bytes, how})
    if (one >= 0) ::close(one);
  if (at == MAP_FAILED || !kept) {
    if (at != MAP_FAILED) munmap(at, handle.size);
    if (kept) munmap(kept, handle.size * sizeof(Store));
    return bytes < 0 || how < 0 ? INVALID_HANDLE : OUT_OF_MEMORY;
  }
  buffers[(char *)at] = {(char *)at, handle.size, ++count, true, true, nullptr, kept};
  *mapped = at;
  return OK;
}

Error close(void *mapped) {
  auto found = buffers.find((char *)mapped);
  if (found == buffers.end() || !found->second.peer) return INVALID_VALUE;
  forget_cells(found->second);
  munmap(mapped, found->second.size);
  buffers.erase(found);
  return OK;
}
}  // namespace sim::memory
