#include "host/page_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <new>

namespace ow {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{16} << 20;
constexpr size_t kAlign = 64;

size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

PagePool::Slice PagePool::allocate(size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();  // rounding up would wrap
  bytes = round_up(std::max(bytes, kAlign), kAlign);
  const std::lock_guard lock(mutex_);
  std::shared_ptr<void> chunk = chunk_.lock();
  if (chunk == nullptr || size_t(end_ - next_) < bytes) {
    const size_t size = round_up(std::max(bytes, kChunk), kHugePage);
    // mmap aligns to 4 KiB: take one huge page more and start at the first boundary.
    const size_t mapped = size + kHugePage;
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    *mapped_ += mapped;
    chunk = std::shared_ptr<void>(base, [mapped, total = mapped_](void* p) {
      munmap(p, mapped);
      *total -= mapped;
    });
    next_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<size_t>(base), kHugePage));
    end_ = next_ + size;
    // Advice only: without huge pages the memory is merely slower.
    madvise(next_, size, MADV_HUGEPAGE);
    chunk_ = chunk;
  }
  uint8_t* data = next_;
  next_ += bytes;
  return {std::move(chunk), data};
}

}  // namespace ow
