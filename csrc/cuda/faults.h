// Values that a weight to be packed must not have, looked for where they are. A fault is the
// element and, in the low bits, what was seen there; the smallest is kept, which is the first.
#pragma once

#include "cuda/device.h"

#include "core/types.h"

namespace ow {

constexpr int kFaultThreads = 128;

OW_DEVICE void keep_first(uint64_t* fault, int64_t element, int seen_bits, uint32_t seen) {
  const uint64_t key = uint64_t(element) << seen_bits | seen;
  // CUDA has no atomicMin of uint64_t, which is unsigned long here.
  atomicMin(reinterpret_cast<unsigned long long*>(fault), static_cast<unsigned long long>(key));
}

// A thread each: codes of more than `bits` bits, as element << 8 | code; scales that are infinite
// or not a number, as element << 32 | the bits of their float.
static __global__ void __launch_bounds__(kFaultThreads)
    find_wide_codes(const uint8_t* codes, int64_t count, int bits, uint64_t* fault) {
  const int64_t i = int64_t(blockIdx.x) * kFaultThreads + threadIdx.x;
  if (i < count && codes[i] >> bits != 0) keep_first(fault, i, 8, codes[i]);
}
static __global__ void __launch_bounds__(kFaultThreads)
    find_infinite_scales(const void* scales, FloatType type, int64_t count, uint64_t* fault) {
  const int64_t i = int64_t(blockIdx.x) * kFaultThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t bits = float_to_bits(read_float(scales, type, i));
  if ((bits & 0x7fffffff) >= 0x7f800000) keep_first(fault, i, 32, bits);
}

}  // namespace ow
