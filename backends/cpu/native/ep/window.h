// A peer window: an anonymous shared file that disappears with the last process that holds it, however that one ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "shared.h"

namespace hal_ep {

struct SystemError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A mapping of a window, one's own or a peer's. The address range is reserved far beyond the file's end, so that a
// window that grows stays where it is; `contains` asks the file before anything beyond the known end is touched.
class Window {
 public:
  static std::shared_ptr<Window> create(const Map& map, uint32_t rank, const uint8_t token[32]);
  // Refuses (std::invalid_argument) a file that cannot be this group's window of that rank.
  static std::shared_ptr<Window> attach(int fd, const Map& map, uint32_t rank, const uint8_t token[32]);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  int fd() const { return fd_; }
  uint8_t* at(uint64_t offset) const { return base_ + offset; }
  uint64_t size() const { return size_; }
  bool contains(uint64_t offset, uint64_t bytes);
  void grow(uint64_t size, bool commit = true);  // Owner only; throws SystemError when there is no memory.

 private:
  Window() = default;
  void map_file();
  int fd_ = -1;
  uint8_t* base_ = nullptr;
  uint64_t reserved_ = 0;
  std::atomic<uint64_t> size_{0};
};

class Arena;

// Memory of the own window in use; given back to the arena when the last holder lets go.
struct Lease {
  std::shared_ptr<Arena> arena;
  uint64_t offset, bytes;
  Lease(std::shared_ptr<Arena> arena_, uint64_t offset_, uint64_t bytes_)
      : arena(std::move(arena_)), offset(offset_), bytes(bytes_) {}
  ~Lease();
  uint8_t* data() const;
};

// First-fit allocation inside the own window behind the control area; neighbours coalesce.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  Arena(std::shared_ptr<Window> window, uint64_t begin) : window_(std::move(window)), end_(begin) {}
  // Uncommitted memory is for packed slots, of which only the rows in use are ever touched.
  std::shared_ptr<Lease> take(uint64_t bytes, bool commit = true);
  void give_back(uint64_t offset, uint64_t bytes);
  Window& window() { return *window_; }
  uint64_t in_use() const { return in_use_; }

 private:
  std::shared_ptr<Window> window_;
  std::mutex lock_;
  std::map<uint64_t, uint64_t> free_;
  uint64_t end_, in_use_ = 0;
};

}  // namespace hal_ep
