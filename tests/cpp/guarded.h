// Operands against pages that cannot be touched, so that one byte too far faults.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

namespace ow::testing {

enum class Against { begin, end };

// Regions of pages, each between two inaccessible ones, reused from case to case. An operand lies
// at one end of its region; the rest holds a pattern that must survive.
class Guarded {
 public:
  static constexpr size_t kRegionBytes = size_t{1} << 20;
  static constexpr uint8_t kPoison = 0xff;  // a NaN in every float type

  explicit Guarded(int regions) : page_(size_t(sysconf(_SC_PAGESIZE))) {
    for (int i = 0; i < regions; ++i) {
      void* base =
          mmap(nullptr, kRegionBytes + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base == MAP_FAILED) fail("mmap");
      uint8_t* data = static_cast<uint8_t*>(base) + page_;
      if (mprotect(data, kRegionBytes, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
      memset(data, kPoison, kRegionBytes);
      regions_.push_back({data, data, 0});
    }
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    for (const Region& region : regions_) munmap(region.data - page_, kRegionBytes + 2 * page_);
  }

  // Forgets the operands; the next ones lie against the beginning or the end of their regions.
  void restart(Against side) {
    for (Region& region : regions_) memset(region.used, kPoison, region.bytes);
    for (Region& region : regions_) region.bytes = 0;
    side_ = side;
    next_ = 0;
  }

  // Room for `count` elements, poisoned.
  template <class T>
  T* empty(size_t count) {
    if (next_ == regions_.size() || count * sizeof(T) > kRegionBytes) fail("region");
    Region& region = regions_[next_++];
    region.bytes = count * sizeof(T);
    region.used = side_ == Against::begin ? region.data : region.data + kRegionBytes - region.bytes;
    return reinterpret_cast<T*>(region.used);
  }
  template <class T>
  T* copy(const std::vector<T>& values) {
    T* at = empty<T>(values.size());
    if (!values.empty()) memcpy(at, values.data(), values.size() * sizeof(T));
    return at;
  }

  // Whether the page beside every operand (on its open side) still holds the pattern.
  bool intact() const {
    for (const Region& region : regions_) {
      if (region.bytes == 0 || region.bytes + page_ > kRegionBytes) continue;
      const uint8_t* begin =
          side_ == Against::begin ? region.used + region.bytes : region.used - page_;
      for (size_t i = 0; i < page_; ++i) {
        if (begin[i] != kPoison) return false;
      }
    }
    return true;
  }

 private:
  struct Region {
    uint8_t* data;
    uint8_t* used;
    size_t bytes;
  };

  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "guarded memory: %s failed\n", what);
    exit(2);
  }

  const size_t page_;
  std::vector<Region> regions_;
  size_t next_ = 0;
  Against side_ = Against::end;
};

}  // namespace ow::testing
