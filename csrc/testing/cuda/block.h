// One block of CUDA threads on the CPU. Blocks run one after another; threads of a block run in
// turns, each until it waits for others at a barrier or a warp operation.
//
// Found and reported as an exception from `launch`: threads that meet at different barriers or warp
// operations or wait for ever, lanes missing from a mask, writes past dynamic shared memory (ASan
// says where), addresses that are not aligned. Every seed is another order of threads, and lets
// asynchronous copies land early or as late as allowed. Under TSan, threads of a block that are not
// ordered by a barrier are concurrent, so that races are found in every order.
//
// Not seen: races between blocks, fences, speed, limits of registers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <source_location>

#include "testing/cuda/fiber.h"
#include "testing/cuda/types.h"

namespace ow::emulation {

using Where = std::source_location;

// 0: threads in order. Other seeds: a random order each.
void set_seed(uint64_t seed);
uint64_t seed();

enum class State : uint8_t { ready, at_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;  // written
  int read;   // of them copied; the others become zero
  unsigned group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned linear, lane, warp;
  State state;
  const char* waits_for;
  Where where;
  static constexpr int kMaxCopies = 256;
  Copy copies[kMaxCopies];  // that are on their way
  int copy_count;
  unsigned copy_group;
};

Thread& current();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
uint8_t* dynamic_shared();

// Threads of a block at most.
constexpr unsigned kMaxThreads = 1024;
// The CUDA error that such a launch would end in, or 0.
int launch_error(dim3 grid, int threads, int shared_bytes);

// Ends the block with a message that names the current thread.
void fail(const char* what, const Where& where);

// A random number of the block's sequence; 0 where threads run in order.
uint64_t random_bits();

// __syncthreads; returns how many threads passed a true predicate.
unsigned barrier(bool predicate, const Where& where);

// All lanes of `mask` meet; the last one runs `finish` over what each passed, by lane. Only
// __syncwarp orders memory.
void meet(unsigned mask, const char* operation, void* argument,
          void (*finish)(void* const*, unsigned), bool orders_memory, const Where& where);

void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
            const void* context);

template <class Body>
void launch(dim3 grid, dim3 block, size_t shared_bytes, const Body& body) {
  launch(
      grid, block, shared_bytes, [](const void* it) { (*static_cast<const Body*>(it))(); }, &body);
}

}  // namespace ow::emulation
