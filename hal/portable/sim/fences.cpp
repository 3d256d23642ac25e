/* Flags between processes: whether what a kernel reads was told to be there.
 *
 * Memory that processes share remembers, for each byte and for all of them, how it was stored last. A work-item that
 * reads what another process stored plainly must have acquired a flag of that process, one that was released after the
 * store: by the same work-item, or by another one beyond a barrier. On the reader's side the same: by itself or beyond a
 * barrier, or in an earlier launch. Of data for which there is no flag nothing is known, and nothing is said: one process
 * may have told the other without the device.
 *
 * A fence for the whole system makes a release of the atomic (or volatile) stores that come after it, and an acquire of
 * the loads that came before. Kernels run one after the other here, so all there is to know of the running one is global.
 */
#include <string.h>
#include <unistd.h>

#include <algorithm>

#include "simulator.h"

namespace sim::fences {
namespace {
enum How : uint8_t { UNKNOWN, PLAIN, RELAXED, RELEASED };

/* A load of a flag that is not acquired yet. */
struct Load {
  unsigned item;
  const char *at;
  const Store *store;
};
struct Fence {
  bool there;
  uint32_t epoch, time;
};
/* The group that runs. */
struct {
  uint32_t serial;
  std::vector<Load> loads;
  std::vector<Fence> fences; /* the last of each work-item */
  bool loaded, joined;       /* whether it has loaded what the device's own stored atomically, and acquired it */
} group;

/* A flag of another process that was acquired, and by whom. */
struct Flag {
  Store store;
  const char *at;
  uint32_t op, serial, epoch;
  unsigned item;
};
std::vector<Flag> flags;
uint32_t now = 1; /* grows with each release */

/* Who wants to know. */
struct Reader {
  const Op &op;
  uint32_t serial, epoch;
  unsigned item;
};

uint32_t self() {
  static const uint32_t process = (uint32_t)getpid();
  return process;
}

void enter(const Where &where) {
  if (group.serial == where.serial && group.fences.size() == where.launch->threads) return;
  group = {where.serial, {}, std::vector<Fence>(where.launch->threads), false, false};
}

/* Another process may be about to change it: what is half of one is of nobody. */
Store look(const Store *at) {
  Store found;
  uint8_t how = __atomic_load_n(&at->how, __ATOMIC_ACQUIRE);
  memcpy(&found, at, sizeof found);
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
  found.how = how == __atomic_load_n(&at->how, __ATOMIC_RELAXED) ? how : (uint8_t)UNKNOWN;
  return found;
}
void keep(Store *at, Store made) {
  uint8_t how = made.how;
  __atomic_store_n(&at->how, UNKNOWN, __ATOMIC_RELAXED);
  __atomic_thread_fence(__ATOMIC_RELEASE);
  made.how = UNKNOWN;
  memcpy(at, &made, sizeof made);
  __atomic_store_n(&at->how, how, __ATOMIC_RELEASE);
}

std::string item_of(const Store &store) {
  return "work-item " + std::to_string(store.item) + " of group " + std::to_string(store.group);
}
/* Who, in which kernel and where, if the process is still there to be asked. */
std::string who(const Store &store) {
  modules::Place place = modules::place((int)store.process, store.file, store.offset);
  std::string kernel = place.kernel.empty() ? "" : place.kernel + ": ", line = place.line.empty() ? "" : " (" + place.line + ")";
  return kernel + item_of(store) + " of process " + std::to_string(store.process) + line;
}
std::string unreleased(const Store &flag) {
  const char *how = flag.how == PLAIN ? " stored it plainly" : " stored it without release, and no fence for the system before";
  return "a flag that was not released: " + who(flag) + how;
}

/* Whether a store came before a release of the same process. */
bool before(const Store &data, const Store &flag) {
  if (data.op != flag.op) return data.op < flag.op;
  if (data.group != flag.group) return flag.joined && data.time <= flag.time;
  if (data.item == flag.item || flag.joined) return data.time <= flag.time;
  return data.epoch < flag.epoch;
}
/* Whether the reader comes after it was acquired. */
bool after(const Reader &reader, const Flag &flag) {
  if (flag.op != reader.op.number) return streams::ordered(flag.op, reader.op);
  return flag.serial == reader.serial ? flag.item == reader.item || flag.epoch < reader.epoch : group.joined;
}

void acquire(const Where &where, const Store &store, const char *at) {
  if (store.how == UNKNOWN) return;
  if (store.process == self()) {
    group.joined = true;
    return;
  }
  Flag made{store, at, where.launch->op->number, where.serial, where.epoch, where.item};
  /* Of each flag: who of this group acquired it, or the last one of those before. */
  auto old = [&](const Flag &flag) {
    if (flag.at != at) return false;
    if (flag.op != made.op) return streams::ordered(flag.op, *where.launch->op);
    return flag.serial != made.serial || flag.item == made.item;
  };
  flags.erase(std::remove_if(flags.begin(), flags.end(), old), flags.end());
  flags.push_back(made);
}

/* What is wrong with reading what another process stored plainly. */
std::string read(const Reader &reader, const Store &data) {
  const Flag *late = nullptr, *early = nullptr, *loose = nullptr;
  for (const Flag &flag : flags) {
    bool of_it = flag.store.process == data.process, there = after(reader, flag);
    if (flag.store.how == RELEASED && there && (flag.store.chained || (of_it && before(data, flag.store)))) return "";
    if (!of_it || data.op > flag.store.op) continue;
    if (flag.store.how != RELEASED)
      loose = there ? &flag : loose;
    else if (!there)
      late = flag.op == reader.op.number ? &flag : late;
    else
      early = &flag;
  }
  for (const Load &load : group.loads) {
    Store flag = reader.serial == group.serial ? look(load.store) : Store{};
    if (flag.how == UNKNOWN || flag.process != data.process || data.op > flag.op) continue;
    if (flag.how != RELEASED) return "it is behind " + unreleased(flag);
    return "read without acquire: work-item " + std::to_string(load.item) + " loaded the flag that " + who(flag) +
           " released, and neither acquired it nor has a fence for the system since";
  }
  if (loose) return "it is behind " + unreleased(loose->store);
  if (late) {
    bool same = late->serial == reader.serial;
    return "no barrier since " + std::string(same ? "" : "another group's ") + "work-item " + std::to_string(late->item) +
           " acquired the flag that " + who(late->store) + " released";
  }
  if (!early) return "";
  bool same = data.group == early->store.group && data.item == early->store.item;
  return "released too early: " + who(data) + " wrote it" +
         (same ? " after it released the flag" : ", and nothing orders that before " + who(early->store) + " released the flag");
}

/* Each of the stores that so many bytes were last written by. */
template <class Each>
std::string each(const Store *stores, size_t size, Each wrong) {
  Store last = {};
  for (size_t i = 0; i < size; i++) {
    Store data = look(stores + i);
    if (data.how != PLAIN || data.process == self() || !memcmp(&data, &last, sizeof data)) continue;
    std::string text = wrong(last = data);
    if (!text.empty()) return text;
  }
  return "";
}
}  // namespace

std::string access(const Where &where, Store *stores, const char *at, size_t size, int kind, const void *from) {
  enter(where);
  int what = kind & HAL_SIM_KIND;
  bool update = what == HAL_SIM_UPDATE, writes = update || what == HAL_SIM_WRITE || what == HAL_SIM_STORE;
  bool plain = what <= HAL_SIM_WRITE && !(kind & HAL_SIM_VOLATILE);
  Store there = look(stores);
  if (!writes || update) {
    bool flag = !plain || (there.how > PLAIN && there.process != self());
    Reader reader{*where.launch->op, where.serial, where.epoch, where.item};
    if (!flag) return each(stores, size, [&](const Store &data) { return read(reader, data); });
    if (update && kind & HAL_SIM_ACQUIRE) {
      std::string wrong = acquired(where, stores, at);
      if (!wrong.empty()) return wrong;
    } else if (!(kind & HAL_SIM_ACQUIRE)) {
      auto same = [&](const Load &load) { return load.at == at && load.item == where.item; };
      if (std::none_of(group.loads.begin(), group.loads.end(), same)) group.loads.push_back({where.item, at, stores});
    }
  }
  if (!writes) return "";
  const Module &module = *where.launch->function.module;
  const Fence &fence = group.fences[where.item];
  Store made{self(), where.launch->op->number, where.group, where.epoch, now, (uint16_t)where.item, PLAIN, group.joined, false,
             module.file, (uint32_t)((uintptr_t)from - module.begin)};
  if (kind & HAL_SIM_RELEASE)
    made.how = RELEASED, now++;
  else if (!plain && fence.there)
    made.how = RELEASED, made.epoch = fence.epoch, made.time = fence.time;
  else if (!plain)
    made.how = RELAXED;
  if (update && there.how == RELEASED) {
    if (made.how == RELAXED) return ""; /* what was released stays so */
    bool own = there.process == self();
    made.joined |= own;
    made.chained = !own || there.chained;
  }
  for (size_t i = 0; i < size; i++) keep(stores + i, made);
  return "";
}

std::string acquired(const Where &where, const Store *stores, const char *at) {
  enter(where);
  Store store = look(stores);
  if (store.how != UNKNOWN && store.how != RELEASED && store.process != self()) return unreleased(store);
  acquire(where, store, at);
  return "";
}

void own(const Where &where, bool acquires) {
  enter(where);
  group.loaded = true;
  group.joined |= acquires;
}

void fence(const Where &where, int scope) {
  enter(where);
  group.joined |= group.loaded;
  if (scope != HAL_SIM_SYSTEM) return;
  group.fences[where.item] = {true, where.epoch, now++};
  auto mine = [&](const Load &load) { return load.item == where.item; };
  for (const Load &load : group.loads)
    if (mine(load)) acquire(where, look(load.store), load.at);
  group.loads.erase(std::remove_if(group.loads.begin(), group.loads.end(), mine), group.loads.end());
}

std::string copied_from(const Op &op, const Store *stores, size_t size) {
  return each(stores, size, [&](const Store &data) { return read({op, 0, 0, 0}, data); });
}

/* By the runtime, whose copies are told of without flags. */
void copied_to(Store *stores, size_t size) {
  for (size_t i = 0; i < size; i++)
    if (stores[i].how) __atomic_store_n(&stores[i].how, UNKNOWN, __ATOMIC_RELEASE);
}

void forget(const char *begin, const char *end) {
  auto there = [&](const Flag &flag) { return flag.at >= begin && flag.at < end; };
  flags.erase(std::remove_if(flags.begin(), flags.end(), there), flags.end());
}
}  // namespace sim::fences
