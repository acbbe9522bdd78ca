// Numbers of pages, handed out and taken back, and the memory behind them.
//
// A page may be held by several rows of a block table (a prefix that sequences share); it is free
// again once the last of them lets go. Tables are the caller's: int32, a list of pages a row, -1
// past its end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace ow {

class PageAllocator {
 public:
  explicit PageAllocator(int32_t pages);

  // Makes the list of row r counts[r] pages long, with free pages in new places, and letting go of
  // those past the end. Gives the pages that are free by that, in rising order.
  // Throws std::length_error, and changes nothing, if there are not enough free pages;
  // std::out_of_range for a table that lists what it does not hold.
  std::vector<int32_t> resize(int32_t* table, int64_t rows, int64_t max_pages,
                              const int64_t* counts);

  // One more row holds the pages.
  void hold(const int32_t* pages, int64_t count);

  // Gives the row pages of its own for places [begin, end) that other rows hold too: pairs of the
  // old page and the new one, whose contents are the caller's to copy.
  std::vector<std::pair<int32_t, int32_t>> unshare(int32_t* row, int64_t begin, int64_t end);

  // Runs [begin, end) of free pages that the given ones, in rising order, lie in.
  std::vector<std::pair<int32_t, int32_t>> free_runs(const std::vector<int32_t>& pages) const;

  int32_t pages() const { return int32_t(holders_.size()); }
  int32_t free_pages() const { return int32_t(free_.size()); }
  int64_t shared_pages() const { return shared_; }

 private:
  int32_t take();
  bool let_go(int32_t page);
  void check_held(int32_t page) const;

  std::vector<int32_t> free_;     // the last is handed out next
  std::vector<int32_t> holders_;  // of each page
  int64_t shared_ = 0;            // pages with several
};

// Gives the memory of runs of pages of `page_bytes` from `base` on back to the system, which makes
// them zeros again: the whole memory pages that lie inside.
void release_memory(void* base, size_t page_bytes,
                    const std::vector<std::pair<int32_t, int32_t>>& runs);

}  // namespace ow
