// What CUDA offers kernels without asking: keywords, indices, barriers, shuffles. Emulated.
#pragma once

#include <math.h>
#include <string.h>

#include "testing/cuda/block.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another on one thread

#define threadIdx (ow::emulation::current().index)
#define blockIdx (ow::emulation::block_index())
#define blockDim (ow::emulation::block_size())
#define gridDim (ow::emulation::grid_size())

#define OW_HERE const ow::emulation::Where& where = ow::emulation::Where::current()

inline void __syncthreads(OW_HERE) { ow::emulation::barrier(false, where); }
inline void __syncwarp(unsigned mask = ~0u, OW_HERE) {
  ow::emulation::meet(mask, "__syncwarp", nullptr, nullptr, true, where);
}

namespace ow::emulation {

// What each lane brings to a shuffle or vote, and takes from it.
struct Exchange {
  uint64_t given;
  uint64_t taken;
  unsigned from;
};
OW_UNCHECKED inline void exchange(void* const* lanes, unsigned mask) {
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) == 0) continue;
    Exchange* to = static_cast<Exchange*>(lanes[l]);
    // A lane outside the mask has no value to give.
    if ((mask >> to->from & 1) == 0)
      fail("a shuffle reads a lane outside its mask", Where::current());
    to->taken = static_cast<Exchange*>(lanes[to->from])->given;
  }
}
OW_UNCHECKED inline void vote(void* const* lanes, unsigned mask) {
  uint64_t votes = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) != 0) votes |= static_cast<Exchange*>(lanes[l])->given << l;
  }
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1) != 0) static_cast<Exchange*>(lanes[l])->taken = votes;
  }
}
template <class T>
T shuffle(unsigned mask, T value, unsigned from, const char* operation, const Where& where) {
  static_assert(sizeof(T) <= 8);
  Exchange x{0, 0, from};
  memcpy(&x.given, &value, sizeof(T));
  meet(mask, operation, &x, exchange, false, where);
  memcpy(&value, &x.taken, sizeof(T));
  return value;
}

}  // namespace ow::emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, OW_HERE) {
  const unsigned from = ow::emulation::current().lane ^ unsigned(lanes);
  return ow::emulation::shuffle(mask, value, from, "__shfl_xor_sync", where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, OW_HERE) {
  return ow::emulation::shuffle(mask, value, unsigned(lane) % 32, "__shfl_sync", where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, OW_HERE) {
  ow::emulation::Exchange x{predicate != 0, 0, 0};
  ow::emulation::meet(mask, "__ballot_sync", &x, ow::emulation::vote, false, where);
  return unsigned(x.taken);
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned long long atomicMin(unsigned long long* to, unsigned long long value) {
  unsigned long long old = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (value < old &&
         !__atomic_compare_exchange_n(to, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
