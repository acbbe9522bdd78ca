#include "testing/cuda/fiber.h"

#include <stdint.h>
#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// Saves the registers a call must keep on the stack, whose pointer goes to *save, and takes up
// another stack.
extern "C" void ow_switch_stack(void** save, void* load);

#if defined(__x86_64__)
asm(R"(.text
.type ow_switch_stack,@function
ow_switch_stack:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size ow_switch_stack,.-ow_switch_stack
)");
#else
#error "the CUDA emulation has no stack switch for this processor"
#endif

namespace ow::emulation {
namespace {

constexpr size_t kGuard = 4096;
constexpr size_t kSavedWords = 8;  // six registers, the entry, and a return address it never uses

}  // namespace

OW_UNCHECKED void Fiber::prepare(void (*entry)(), int slot) {
  if (stack_ == nullptr) {
    void* mapped = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapped, kGuard, PROT_NONE);  // a stack that grows too far faults
    stack_ = static_cast<char*>(mapped) + kGuard;
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStack);  // the last frames on it never returned
#endif
  constexpr size_t kSlots = 32;
  constexpr size_t kSlotBytes = 192;
  uintptr_t* top =
      reinterpret_cast<uintptr_t*>(stack_ + kStack - size_t(slot) % kSlots * kSlotBytes);
  for (size_t i = 1; i <= kSavedWords; ++i) top[-int(i)] = 0;
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  pointer_ = top - kSavedWords;
  asan_ = nullptr;
}

OW_UNCHECKED void Fiber::adopt() {
  stack_ = nullptr;
#if defined(__SANITIZE_THREAD__)
  tsan_ = __tsan_get_current_fiber();
#endif
}

namespace {
Fiber* left = nullptr;  // which the last switch came from
}

OW_UNCHECKED void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (left->stack_ == nullptr) {  // an adopted one: only now is its stack known
    left->stack_ = static_cast<char*>(const_cast<void*>(bottom));
    left->size_ = size;
  }
#endif
}

OW_UNCHECKED void Fiber::switch_to(Fiber* other, bool last) {
  left = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &asan_, other->stack_, other->size_);
#else
  (void)last;
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(other->tsan_, __tsan_switch_to_fiber_no_sync);
#endif
  ow_switch_stack(&pointer_, other->pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(asan_, nullptr, nullptr);
#endif
}

#if defined(__SANITIZE_THREAD__)
void release(void* place) { __tsan_release(place); }
void acquire(void* place) { __tsan_acquire(place); }
#else
void release(void*) {}
void acquire(void*) {}
#endif

}  // namespace ow::emulation
