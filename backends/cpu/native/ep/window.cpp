#include "window.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <new>

namespace hal_ep {
namespace {

constexpr uint64_t kReserve = uint64_t(1) << 38;
constexpr uint64_t kGrain = 1 << 16;
constexpr uint64_t kMuch = uint64_t(64) << 20;

std::string why(const char* what) { return std::string(what) + ": " + std::strerror(errno); }

// Where the kernel has less than it was asked for it does not refuse: it ends a process.
uint64_t available() {
  uint64_t kilobytes = UINT64_MAX >> 10;
  if (FILE* file = std::fopen("/proc/meminfo", "re")) {
    char line[128];
    while (std::fgets(line, sizeof line, file) != nullptr && std::sscanf(line, "MemAvailable: %" SCNu64, &kilobytes) != 1) {
    }
    std::fclose(file);
  }
  return kilobytes << 10;
}

}  // namespace

std::shared_ptr<Window> Window::create(const Map& map, uint32_t rank, const uint8_t token[32]) {
  std::shared_ptr<Window> made(new Window);
  made->fd_ = int(memfd_create("hal-ep", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (made->fd_ < 0) throw SystemError(why("memfd_create"));
  made->grow(map.end);
  // A window that cannot shrink cannot take mapped memory away from a peer.
  if (fcntl(made->fd_, F_ADD_SEALS, F_SEAL_SHRINK) != 0) throw SystemError(why("sealing the window"));
  made->map_file();
  auto* header = new (made->base_) Header;
  header->rank = rank;
  header->ranks = map.ranks;
  header->sources = map.sources;
  header->experts = map.experts;
  header->all_ranks = map.all_ranks;
  header->control_bytes = map.end;
  std::memcpy(header->token, token, 32);
  std::memcpy(header->magic, kMagic, 8);
  return made;
}

std::shared_ptr<Window> Window::attach(int fd, const Map& map, uint32_t rank, const uint8_t token[32]) {
  std::shared_ptr<Window> made(new Window);
  made->fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  struct stat info;
  if (made->fd_ < 0 || fstat(made->fd_, &info) != 0) throw SystemError(why("attaching a window"));
  if (!S_ISREG(info.st_mode) || info.st_uid != geteuid())
    throw std::invalid_argument("the file belongs to another user");
  if (uint64_t(info.st_size) < map.end) throw std::invalid_argument("the file is shorter than its control area");
  int seals = fcntl(made->fd_, F_GET_SEALS);
  if (seals < 0 || !(seals & F_SEAL_SHRINK)) throw std::invalid_argument("the file may be truncated by its owner");
  made->size_ = uint64_t(info.st_size);
  made->map_file();
  const auto* header = reinterpret_cast<const Header*>(made->base_);
  if (std::memcmp(header->magic, kMagic, 8) != 0) throw std::invalid_argument("the file is not a peer window");
  if (std::memcmp(header->token, token, 32) != 0) throw std::invalid_argument("the window belongs to another group");
  if (header->rank != rank || header->ranks != map.ranks || header->sources != map.sources ||
      header->experts != map.experts || header->all_ranks != map.all_ranks || header->control_bytes != map.end)
    throw std::invalid_argument("the window has another geometry");
  return made;
}

void Window::map_file() {
  for (reserved_ = kReserve; reserved_ >= size_; reserved_ /= 2) {
    void* at = mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
    if (at != MAP_FAILED) {
      base_ = static_cast<uint8_t*>(at);
      madvise(at, reserved_, MADV_DONTDUMP);
      return;
    }
  }
  throw SystemError(why("mapping a window"));
}

Window::~Window() {
  if (base_ != nullptr) munmap(base_, reserved_);
  if (fd_ >= 0) close(fd_);
}

bool Window::contains(uint64_t offset, uint64_t bytes) {
  if (offset > reserved_ || bytes > reserved_ - offset) return false;
  if (offset + bytes <= size_) return true;
  struct stat info;
  if (fstat(fd_, &info) != 0) return false;
  size_ = uint64_t(info.st_size);
  return offset + bytes <= size_;
}

void Window::grow(uint64_t size, bool commit) {
  if (base_ != nullptr && size > reserved_) throw SystemError("the window's address range is used up");
  const uint64_t more = size - size_;
  if (commit && more >= kMuch)
    if (const uint64_t there = available(); more > there)
      throw SystemError("growing a window by " + std::to_string(more) + " bytes: " + std::to_string(there) + " are free");
  int failed;
  do {
    if (commit)
      failed = posix_fallocate(fd_, off_t(size_), off_t(size - size_));
    else
      failed = ftruncate(fd_, off_t(size)) == 0 ? 0 : errno;
  } while (failed == EINTR);
  if (failed != 0) {
    errno = failed;
    throw SystemError(why("growing a window"));
  }
  size_ = size;
}

Lease::~Lease() { arena->give_back(offset, bytes); }
uint8_t* Lease::data() const { return arena->window().at(offset); }

std::shared_ptr<Lease> Arena::take(uint64_t bytes, bool commit) {
  bytes = (bytes + kGrain - 1) / kGrain * kGrain;
  bytes = bytes == 0 ? kGrain : bytes;
  uint64_t offset = 0;
  {
    std::lock_guard<std::mutex> hold(lock_);
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second < bytes) continue;
      offset = it->first;
      uint64_t rest = it->second - bytes;
      free_.erase(it);
      if (rest != 0) free_[offset + bytes] = rest;
      break;
    }
    if (offset == 0) {
      // A free region at the end is made longer instead of left behind.
      uint64_t begin = end_;
      if (!free_.empty() && std::prev(free_.end())->first + std::prev(free_.end())->second == end_)
        begin = std::prev(free_.end())->first;
      window_->grow(begin + bytes, commit);
      if (begin != end_) free_.erase(std::prev(free_.end()));
      offset = begin;
      end_ = begin + bytes;
    }
    in_use_ += bytes;
  }
  return std::make_shared<Lease>(shared_from_this(), offset, bytes);
}

void Arena::give_back(uint64_t offset, uint64_t bytes) {
  std::lock_guard<std::mutex> hold(lock_);
  in_use_ -= bytes;
  auto next = free_.lower_bound(offset);
  if (next != free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == offset) {
      offset = before->first;
      bytes += before->second;
      free_.erase(before);
    }
  }
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    free_.erase(next);
  }
  free_[offset] = bytes;
}

}  // namespace hal_ep
