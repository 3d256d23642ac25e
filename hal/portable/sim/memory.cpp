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
constexpr uint64_t MAGIC = 0x68616c2d73696d31;
constexpr int POISON = 0xff, RED = 0xa5;

char *area, *cursor;
int file = -1;
size_t used;
unsigned count;
std::map<char *, Buffer> buffers; /* by base; freed ones too */

bool there() {
  if (area) return true;
  file = memfd_create("device memory", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, AREA)) return false;
  void *mapped = mmap(nullptr, AREA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (mapped == MAP_FAILED) return false;
  cursor = area = (char *)mapped;
  return true;
}

char *begin(const Buffer &buffer) { return buffer.base - PAGE; }
char *end(const Buffer &buffer) { return buffer.base + (buffer.size + RED_ZONE + PAGE - 1) / PAGE * PAGE; }

void forget_cells(Buffer &buffer) {
  if (buffer.cells) munmap(buffer.cells, buffer.size * sizeof(Cell));
  buffer.cells = nullptr;
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
  Buffer buffer{at + PAGE, size, ++count, true, false, nullptr};
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
  bool within = found && found->alive && at >= found->base && at + size <= found->base + found->size;
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
  *handle = {MAGIC, getpid(), file, (uint64_t)(found->base - area), found->size};
  return OK;
}

Error open(void **mapped, const Handle &handle) {
  if (handle.magic != MAGIC || handle.process == getpid()) return INVALID_VALUE;
  std::string path = "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.file);
  int theirs = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (theirs < 0) return INVALID_HANDLE;
  void *at = mmap(nullptr, handle.size, PROT_READ | PROT_WRITE, MAP_SHARED, theirs, (off_t)handle.offset);
  ::close(theirs);
  if (at == MAP_FAILED) return OUT_OF_MEMORY;
  buffers[(char *)at] = {(char *)at, handle.size, ++count, true, true, nullptr};
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
