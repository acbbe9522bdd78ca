// Stackful coroutines: a CUDA thread of the emulation is one. Sanitizers are told of every switch.
#pragma once

#include <stddef.h>

// Under TSan the scheduler's own memory is no part of what is checked: threads of a block count as
// concurrent, and it serves them all.
#if defined(__SANITIZE_THREAD__)
#define OW_UNCHECKED __attribute__((noinline, no_sanitize_thread))
#else
#define OW_UNCHECKED
#endif

namespace ow::emulation {

class Fiber {
 public:
  // Begins anew: the next switch to it calls `entry`, which must not return. `slot` spreads the
  // tops of the stacks over the sets of the cache.
  void prepare(void (*entry)(), int slot);
  // The fiber that runs already, which has no stack of its own here.
  void adopt();
  // First thing in `entry`.
  void entered();
  // From this fiber, which runs, to another. `last`: this one will not be switched to again.
  void switch_to(Fiber* other, bool last);

 private:
  static constexpr size_t kStack = 256 << 10;

  void* pointer_ = nullptr;  // where registers are saved
  char* stack_ = nullptr;    // lowest byte
  size_t size_ = kStack;
  void* tsan_ = nullptr;
  void* asan_ = nullptr;
};

// Memory accesses before a release happen before those after the acquire of the same place. Only
// TSan is interested.
void release(void* place);
void acquire(void* place);

}  // namespace ow::emulation
