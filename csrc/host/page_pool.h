// Memory for packed weights: 64-byte aligned slices of chunks that are aligned to 2 MiB and advised
// for huge pages. Decoding reads every weight once a token; with 4 KiB pages address translation
// costs a quarter of the read rate, and small matrices would never fill a huge page on their own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace ow {

class PagePool {
 public:
  // A slice keeps its chunk alive; the chunk is unmapped with its last slice.
  struct Slice {
    std::shared_ptr<void> chunk;
    uint8_t* data;
  };

  // Zeroed memory. Throws std::bad_alloc.
  Slice allocate(size_t bytes);

  // Bytes mapped by chunks that are still alive.
  size_t mapped_bytes() const { return *mapped_; }

 private:
  std::mutex mutex_;
  std::weak_ptr<void> chunk_;
  uint8_t* next_ = nullptr;
  uint8_t* end_ = nullptr;
  // Shared with the chunks, which may outlive the pool and are released on any thread.
  std::shared_ptr<std::atomic<size_t>> mapped_ = std::make_shared<std::atomic<size_t>>(0);
};

}  // namespace ow
