#include "host/page_allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace ow {
namespace {

constexpr size_t kMemoryPage = 4096;

}  // namespace

PageAllocator::PageAllocator(int32_t pages) : holders_(size_t(pages)) {
  free_.reserve(size_t(pages));
  for (int32_t page = pages; page-- > 0;) free_.push_back(page);
}

void PageAllocator::check_held(int32_t page) const {
  if (page < 0 || page >= pages() || holders_[size_t(page)] == 0) {
    throw std::out_of_range("block_table lists page " + std::to_string(page) +
                            ", which no row holds");
  }
}

int32_t PageAllocator::take() {
  const int32_t page = free_.back();
  free_.pop_back();
  holders_[size_t(page)] = 1;
  return page;
}

bool PageAllocator::let_go(int32_t page) {
  const int32_t left = --holders_[size_t(page)];
  shared_ -= left == 1;
  if (left == 0) free_.push_back(page);
  return left == 0;
}

std::vector<int32_t> PageAllocator::resize(int32_t* table, int64_t rows, int64_t max_pages,
                                           const int64_t* counts) {
  // Lists are dense, so only what changes is looked at.
  size_t wanted = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* row = table + r * max_pages;
    if (counts[r] < 0 || counts[r] > max_pages) {
      throw std::length_error("a row needs " + std::to_string(counts[r]) + " pages of " +
                              std::to_string(max_pages));
    }
    for (int64_t i = counts[r]; i-- > 0 && row[i] < 0;) ++wanted;
    for (int64_t i = counts[r]; i < max_pages && row[i] >= 0; ++i) check_held(row[i]);
  }
  if (wanted > free_.size()) {
    throw std::length_error(std::to_string(wanted) + " pages are needed and " +
                            std::to_string(free_.size()) + " are free");
  }
  std::vector<int32_t> freed;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* row = table + r * max_pages;
    int64_t held = counts[r];
    while (held > 0 && row[held - 1] < 0) --held;
    for (; held < counts[r]; ++held) row[held] = take();
    for (int64_t i = counts[r]; i < max_pages && row[i] >= 0; ++i) {
      if (let_go(row[i])) freed.push_back(row[i]);
      row[i] = -1;
    }
  }
  std::sort(freed.begin(), freed.end());
  return freed;
}

void PageAllocator::hold(const int32_t* pages, int64_t count) {
  for (int64_t i = 0; i < count; ++i) check_held(pages[i]);
  for (int64_t i = 0; i < count; ++i) shared_ += ++holders_[size_t(pages[i])] == 2;
}

std::vector<std::pair<int32_t, int32_t>> PageAllocator::unshare(int32_t* row, int64_t begin,
                                                                int64_t end) {
  size_t wanted = 0;
  for (int64_t i = begin; i < end; ++i) {
    check_held(row[i]);
    wanted += holders_[size_t(row[i])] > 1;
  }
  if (wanted > free_.size()) {
    throw std::length_error(std::to_string(wanted) + " pages are needed and " +
                            std::to_string(free_.size()) + " are free");
  }
  std::vector<std::pair<int32_t, int32_t>> copies;
  for (int64_t i = begin; i < end; ++i) {
    if (holders_[size_t(row[i])] == 1) continue;
    const int32_t own = take();
    copies.emplace_back(row[i], own);
    let_go(row[i]);
    row[i] = own;
  }
  return copies;
}

std::vector<std::pair<int32_t, int32_t>> PageAllocator::free_runs(
    const std::vector<int32_t>& pages) const {
  std::vector<std::pair<int32_t, int32_t>> runs;
  const auto is_free = [&](int32_t page) {
    return page >= 0 && page < this->pages() && holders_[size_t(page)] == 0;
  };
  for (const int32_t page : pages) {
    if (!runs.empty() && page < runs.back().second) continue;
    if (!is_free(page)) continue;
    int32_t begin = page;
    int32_t end = page + 1;
    // Far neighbours were given back when they became free: one memory page is enough to look at.
    while (is_free(begin - 1) && page - begin < int32_t(kMemoryPage)) --begin;
    while (is_free(end) && end - page < int32_t(kMemoryPage)) ++end;
    runs.emplace_back(begin, end);
  }
  return runs;
}

void release_memory(void* base, size_t page_bytes,
                    const std::vector<std::pair<int32_t, int32_t>>& runs) {
  const auto start = reinterpret_cast<uintptr_t>(base);
  for (const auto& [first, last] : runs) {
    const uintptr_t begin = start + size_t(first) * page_bytes;
    const uintptr_t end = start + size_t(last) * page_bytes;
    const uintptr_t low = (begin + kMemoryPage - 1) / kMemoryPage * kMemoryPage;
    const uintptr_t high = end / kMemoryPage * kMemoryPage;
    if (low < high) madvise(reinterpret_cast<void*>(low), high - low, MADV_DONTNEED);
  }
}

}  // namespace ow
