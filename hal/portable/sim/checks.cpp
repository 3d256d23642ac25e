/* Every access of a kernel, looked at before it happens.
 *
 * A byte remembers who wrote and who read it last, plainly and atomically. Two accesses of which one writes are a race
 * unless both are atomic or something orders them: a barrier for items of a group, nothing for groups of a launch, streams
 * and events for launches.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "simulator.h"

namespace sim {
Checks checks() {
  const char *asked = getenv("HAL_SIM_CHECK"), *seed = getenv("HAL_SIM_SEED"), *eager = getenv("HAL_SIM_EAGER");
  std::string words = std::string(",") + (asked ? asked : "") + ",";
  auto has = [&](const char *word) {
    return words.find(std::string(",") + word + ",") != words.npos || words == ",all,";
  };
  return {has("memory"), has("races"), has("uninitialised"), has("order"), has("streams"), has("fences"), eager && *eager == '1',
          seed ? (unsigned)strtoul(seed, nullptr, 10) : 0};
}

namespace check {
namespace {
const char *done(int kind) {
  switch (kind & HAL_SIM_KIND) {
    case HAL_SIM_READ: case HAL_SIM_LOAD: return " reads ";
    case HAL_SIM_WRITE: case HAL_SIM_STORE: return " writes ";
    default: return " updates ";
  }
}
bool writes(int kind) { return (kind & HAL_SIM_KIND) != HAL_SIM_READ && (kind & HAL_SIM_KIND) != HAL_SIM_LOAD; }
bool atomic(int kind) { return (kind & HAL_SIM_KIND) >= HAL_SIM_LOAD; }
/* Whether what was there before matters. */
bool takes(int kind) { return (kind & HAL_SIM_KIND) != HAL_SIM_WRITE && (kind & HAL_SIM_KIND) != HAL_SIM_STORE; }

std::string bytes(size_t size) { return std::to_string(size) + (size == 1 ? " byte" : " bytes"); }

/* `name[index]` of an address: the kernel's own name for it, and the number of the element there. */
std::string element(const Where &where, const Buffer *buffer, const char *address) {
  const hal_sim_kernel &kernel = *where.launch->function.kernel;
  const char *name = kernel.names;
  for (unsigned i = 0; buffer && i < kernel.count; i++) {
    size_t length = strcspn(name, "\n");
    if (kernel.parameters[i].element) {
      const char *given;
      memcpy(&given, where.launch->given[i], sizeof given);
      if (memory::find(given) == buffer) {
        ptrdiff_t index = (address - given) / (ptrdiff_t)kernel.parameters[i].element;
        if (address < given) index = -((given - address + kernel.parameters[i].element - 1) / kernel.parameters[i].element);
        return std::string(name, length) + "[" + std::to_string(index) + "]";
      }
    }
    name += length + (name[length] != 0);
  }
  return buffer ? "buffer " + std::to_string(buffer->number) : "an address";
}

struct Spot {
  const Where &where;
  size_t size;
  int kind;
  const void *from;

  std::string wrong(const std::string &what, const std::string &how) const {
    std::string text = work_item(where) + done(kind) + bytes(size) + " at " + what + ": " + how;
    return text + " (" + modules::place(*where.launch->function.module, from) + ")";
  }
};

Stamp stamp(const Where &where, uint32_t op) {
  unsigned wave = where.item / where.launch->chip->wavefront;
  return {op, where.group, where.epoch, (uint16_t)where.item, where.phases[wave], (uint8_t)wave, false, false, false};
}

std::string other_item(const Stamp &stamp, bool same_group) {
  if (stamp.items) return same_group ? "several work-items" : "work-items of group " + std::to_string(stamp.group);
  std::string text = "work-item " + std::to_string(stamp.item);
  return same_group ? text : text + " of group " + std::to_string(stamp.group);
}

/* What was read before a shuffle was read before whatever comes after it in the same wavefront. */
bool shuffled(const Stamp &read, const Stamp &mine) {
  return !read.waves && read.wave == mine.wave && read.phase != mine.phase;
}

/* Whether nothing in a launch orders what was done before what is done now. */
bool apart(const Stamp &earlier, const Stamp &mine, bool across) {
  if (earlier.op != mine.op) return false;
  if (across && (earlier.groups || earlier.group != mine.group)) return true;
  return earlier.group == mine.group && earlier.epoch == mine.epoch && (earlier.items || earlier.item != mine.item);
}
bool read_apart(const Stamp &read, const Stamp &mine, bool across) {
  bool others = read.groups || read.group != mine.group;
  return apart(read, mine, across) && ((across && others) || !shuffled(read, mine));
}

/* What an access to a byte is at odds with; null if with nothing. `mine` is who accesses now. */
const char *conflict(const Cell &cell, const Stamp &mine, int kind, bool across, const Stamp **with) {
  if (apart(*(*with = &cell.write), mine, across)) return "wrote";
  if (!atomic(kind) && apart(*(*with = &cell.update), mine, across)) return "updated";
  if (writes(kind) && read_apart(*(*with = &cell.read), mine, across)) return "read";
  if (writes(kind) && !atomic(kind) && read_apart(*(*with = &cell.load), mine, across)) return "read";
  return nullptr;
}

void note(Cell &cell, const Stamp &mine, int kind) {
  Stamp &last = writes(kind) ? atomic(kind) ? cell.update : cell.write : atomic(kind) ? cell.load : cell.read;
  bool same_op = last.op == mine.op, groups = same_op && (last.groups || last.group != mine.group);
  bool since = same_op && last.group == mine.group && last.epoch == mine.epoch;
  if (!writes(kind) && shuffled(last, mine)) since = false;
  bool items = since && (last.items || last.item != mine.item), waves = since && (last.waves || last.wave != mine.wave);
  last = mine, last.groups = groups, last.items = items, last.waves = waves;
  if (writes(kind)) cell.written = mine.op;
}

std::string local(const Where &where, size_t at, const Spot &spot) {
  const Module &module = *where.launch->function.module;
  const Checks &asked = where.launch->checks;
  const char *kernel = where.launch->function.kernel->name;
  const Array *nearest = nullptr;
  size_t distance = ~size_t(0);
  for (const Array &array : module.arrays) {
    if (array.kernel != kernel) continue;
    size_t away = at < array.offset ? array.offset - at : at + spot.size > array.offset + array.size ? at - array.offset : 0;
    if (away >= array.size && at >= array.offset) away -= array.size;
    if (away < distance || !nearest) nearest = &array, distance = away;
    if (at >= array.offset && at + spot.size <= array.offset + array.size) {
      nearest = &array, distance = 0;
      break;
    }
  }
  if (!nearest) return asked.memory ? spot.wrong("local memory", "the kernel has none there") : "";
  std::string name = "byte " + std::to_string((ptrdiff_t)at - (ptrdiff_t)nearest->offset) + " of local memory " + nearest->name;
  if (at < nearest->offset || at + spot.size > nearest->offset + nearest->size)
    return asked.memory ? spot.wrong(name, "out of bounds, there are " + bytes(nearest->size)) : "";

  Stamp mine = stamp(where, where.serial);
  for (size_t i = at; i < at + spot.size; i++) {
    Cell &cell = (*where.local_cells)[i];
    if (asked.uninitialised && takes(spot.kind) && cell.written != where.serial)
      return spot.wrong(name, "uninitialised");
    const Stamp *with;
    const char *did = asked.races ? conflict(cell, mine, spot.kind, false, &with) : nullptr;
    if (did) return spot.wrong(name, "a race, " + other_item(*with, true) + " " + did + " it since the last barrier");
    note(cell, mine, spot.kind);
  }
  return "";
}

std::string bounds(const Buffer *buffer, const char *at, size_t size) {
  if (!buffer) return "not memory of the device";
  if (!buffer->alive) return "use after free, of a buffer of " + bytes(buffer->size);
  if (at < buffer->base) return "out of bounds, " + bytes(buffer->base - at) + " before a buffer of " + bytes(buffer->size);
  const char *end = buffer->base + buffer->size;
  if (at > end || size > (size_t)(end - at)) /* whose sum may be none */
    return "out of bounds, the buffer of " + bytes(buffer->size) + " ends " +
           (at >= end ? bytes(at - end) + " before" : "within");
  return "";
}

Cell *cells(Buffer &buffer) {
  if (!buffer.cells) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *made = mmap(nullptr, std::max<size_t>(1, buffer.size) * sizeof(Cell), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (made != MAP_FAILED) buffer.cells = (Cell *)made;
  }
  return buffer.cells;
}

/* Work that touched the byte, and that nothing orders before this; null if there is none. */
const Stamp *unordered(const Cell &cell, const Op &op, bool writes) {
  for (const Stamp *one : {&cell.write, &cell.update, &cell.read, &cell.load}) {
    if (!writes && one == &cell.read) break;
    if (one->op && one->op != op.number && !streams::ordered(one->op, op)) return one;
  }
  return nullptr;
}
}  // namespace

std::string access(const Where &where, const void *address, size_t size, int kind, const void *from) {
  const Checks &asked = where.launch->checks;
  const Module &module = *where.launch->function.module;
  const char *at = (const char *)address;
  Spot spot{where, size, kind, from};
  if (at >= where.local && at < where.local + module.local_size) return local(where, at - where.local, spot);
  if ((uintptr_t)at >= module.begin && (uintptr_t)at < module.end) return "";
  Buffer *buffer = memory::find(at);
  std::string out = bounds(buffer, at, size);
  if (!out.empty()) return asked.memory || !buffer ? spot.wrong(element(where, buffer, at), out) : "";

  Cell *cell = cells(*buffer);
  if (!cell) return "";
  cell += at - buffer->base;
  Stamp mine = stamp(where, where.launch->op->number);
  for (size_t i = 0; i < size; i++, cell++) {
    /* What others wrote to memory that they have too is not known. */
    if (asked.uninitialised && takes(kind) && !cell->written && !buffer->stores)
      return spot.wrong(element(where, buffer, at + i), "uninitialised");
    const Stamp *with;
    const char *did = asked.races ? conflict(*cell, mine, kind, true, &with) : nullptr;
    if (did) {
      bool same = with->group == where.group;
      std::string since = same ? " it since the last barrier" : " it in the same launch";
      return spot.wrong(element(where, buffer, at + i), "a race, " + other_item(*with, same) + " " + did + since);
    }
    const Stamp *early = asked.streams ? unordered(*cell, *where.launch->op, writes(kind)) : nullptr;
    if (early)
      return spot.wrong(element(where, buffer, at + i), "nothing waits for " + streams::name(early->op) + ", which used it");
    note(*cell, mine, kind);
  }
  if (!asked.fences) return "";
  if (!buffer->stores) {
    if (takes(kind) && (atomic(kind) || kind & HAL_SIM_VOLATILE)) fences::own(where, kind & HAL_SIM_ACQUIRE);
    return "";
  }
  std::string loose = fences::access(where, buffer->stores + (at - buffer->base), at, size, kind, from);
  return loose.empty() ? "" : spot.wrong(element(where, buffer, at), loose);
}

std::string acquired(const Where &where, const void *address, size_t size, const void *from) {
  const char *at = (const char *)address;
  Buffer *buffer = where.launch->checks.fences ? memory::alive(at, size) : nullptr;
  if (!buffer || !buffer->stores) return "";
  std::string loose = fences::acquired(where, buffer->stores + (at - buffer->base), at);
  return loose.empty() ? "" : Spot{where, size, HAL_SIM_LOAD, from}.wrong(element(where, buffer, at), loose);
}

namespace {
/* One end of a copy; `from` is where its bytes come from, null if they are of the host or a fill. */
std::string end_of_copy(const Op &op, const void *address, size_t size, int kind, const Cell *from, const Cell **found) {
  Checks asked = checks();
  Buffer *buffer = memory::find(address);
  if (!buffer) return ""; /* of the host */
  const char *at = (const char *)address;
  std::string whole = op.what + done(kind) + bytes(size) + " at buffer " + std::to_string(buffer->number) + ": ";
  std::string out = bounds(buffer, at, size);
  if (!out.empty()) return whole + out;
  if (!asked.accesses()) return "";
  Cell *cell = cells(*buffer);
  if (!cell) return "";
  cell += at - buffer->base;
  if (!buffer->stores) *found = cell;
  Stamp mine = {};
  mine.op = op.number;
  for (size_t i = 0; i < size; i++, cell++) {
    const Stamp *early = asked.streams ? unordered(*cell, op, writes(kind)) : nullptr;
    if (early)
      return op.what + done(kind) + "byte " + std::to_string(at - buffer->base + i) + " of buffer " +
             std::to_string(buffer->number) + ": nothing waits for " + streams::name(early->op) + ", which used it";
    bool poison = from && !from[i].written;
    note(*cell, mine, kind);
    if (poison) cell->written = 0;
  }
  if (!asked.fences || !buffer->stores) return "";
  Store *stores = buffer->stores + (at - buffer->base);
  if (writes(kind)) return fences::copied_to(stores, size), "";
  std::string loose = fences::copied_from(op, stores, size);
  return loose.empty() ? "" : whole + loose;
}
}  // namespace

std::string copy(const Op &op, const void *to, const void *from, size_t size) {
  const Cell *source = nullptr, *unused;
  std::string wrong = from ? end_of_copy(op, from, size, HAL_SIM_READ, nullptr, &source) : "";
  return wrong.empty() ? end_of_copy(op, to, size, HAL_SIM_WRITE, source, &unused) : wrong;
}
}  // namespace check
}  // namespace sim
