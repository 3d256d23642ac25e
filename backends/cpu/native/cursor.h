// Which rows a task reads: its queries, the tokens of its sequence, and how many of those each query sees.
#pragma once

#include "problem.h"

namespace hal_cpu {
namespace {

template <class T>
inline const T* query_row(const Problem& p, const Block& b, int r) {
  const int row = b.first_row + r;
  return (const T*)b.q + row / p.group * p.q_token + row % p.group * p.q_head;
}

// How many of the tile's tokens each row attends to; true if that is all of them for every row. Rows past the block's
// own attend to all.
inline bool count_seen(const Problem& p, const Block& b, int begin, int count, int rows, float* seen) {
  bool all = true;
  for (int r = 0; r < rows; ++r) {
    int n = count;
    if (r < b.rows) {
      n = visible(p, b, b.first_row + r) - begin;
      n = n < 0 ? 0 : n > count ? count : n;
    }
    seen[r] = (float)n;
    all &= n == count;
  }
  return all;
}

// Asks memory for what the next tile needs while this one is computed with: into the second-level cache, which can wait
// for many more lines than the first, and a few at a time between multiplications, because a burst holds up the work.
inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");  // or GCC takes a function that only asks for one that does nothing
}

template <class T>
inline void prefetch_row(const T* row, int dim) {
  for (int d = 0; d < dim; d += 64 / sizeof(T)) prefetch(row + d);
}

// The lines of some rows, asked for one after the other, a few at a time, by whatever is computed meanwhile.
class Ahead {
 public:
  // At least one row.
  template <class T>
  Ahead(const T* const* rows, int count, int dim)
      : rows_((const char* const*)rows), left_(count), size_(dim * sizeof(T)), at_(*rows_), end_(at_ + size_) {}

  // The next n lines. Once all are asked for, the last row's again, which cost little.
  template <int n>
  void ask() {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      prefetch(at_);
      at_ += kLine;
      if (at_ < end_) continue;
      if (left_ > 1) --left_, ++rows_;
      at_ = *rows_;
      end_ = at_ + size_;
    }
  }

  static constexpr int kLine = 64;

 private:
  const char* const* rows_;
  int left_, size_;
  const char *at_, *end_;
};

// For work that has no time for it.
struct NothingAhead {
  template <int n>
  void ask() {}
};

// Walks over the rows of a sequence.
class Cursor {
 public:
  // The table is only looked at for a page that has a token in use.
  Cursor(const Problem& p, const Block& b, int begin, int end)
      : p_(p), b_(b), size_(p.dtype == kFloat32 ? 4 : 2), left_(end - begin) {
    page_ = begin / p.page_size;
    offset_ = begin % p.page_size;
    if (left_ > 0) rows_ = b.kv + b.pages[page_] * p.kv_page * size_;
  }

  const char* next() {
    const char* row = rows_ + offset_ * p_.kv_token * size_;
    if (++offset_ == p_.page_size && left_ > 1) {
      offset_ = 0;
      rows_ = b_.kv + b_.pages[++page_] * p_.kv_page * size_;
    }
    --left_;
    return row;
  }

  // Where the next n rows lie.
  template <class T>
  void find(int n, const T** rows) {
    for (int i = 0; i < n; ++i) rows[i] = (const T*)next();
  }

 private:
  const Problem& p_;
  const Block& b_;
  const ptrdiff_t size_;
  int left_, page_, offset_;
  const char* rows_ = nullptr;
};

// The rows of n tiles in a row: the one computed with, and those after it that memory is asked for.
template <class T, int n, int size>
class Window {
 public:
  Window(const Problem& p, const Block& b, int begin, int end)
      : cursor_(p, b, begin, end), last_byte_(p.head_dim * sizeof(T) - 1), left_(end - begin) {
    for (int i = 0; i < n; ++i) fill(i);
  }

  const T** rows(int i) { return rows_[(now_ + i) % n]; }
  int count(int i) const { return counts_[(now_ + i) % n]; }

  void advance() {
    fill(now_);
    now_ = (now_ + 1) % n;
  }

 private:
  // The first and last line of each row are asked for at once. With pages of 4 KiB finding out where an address lies
  // takes as long as fetching what is there, and all lines of a page wait for that.
  void fill(int i) {
    counts_[i] = left_ < size ? left_ : size;
    left_ -= counts_[i];
    cursor_.find(counts_[i], rows_[i]);
    for (int t = 0; t < counts_[i]; ++t) {
      prefetch(rows_[i][t]);
      prefetch((const char*)rows_[i][t] + last_byte_);
    }
  }

  Cursor cursor_;
  ptrdiff_t last_byte_;
  int left_, now_ = 0;
  int counts_[n];
  const T* rows_[n][size] = {};
};

}  // namespace
}  // namespace hal_cpu
