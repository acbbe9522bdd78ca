// What the checks of families share: random operands, and results that must equal those of the
// scalar kernels to the bit. Programs are emulated, plain and under sanitizers.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <stdexcept>
#include <vector>

#include "core/types.h"
#include "cuda/status.h"
#include "testing/cuda/block.h"

namespace ow::check {

using Bytes = std::vector<uint8_t>;

inline uint32_t state = 7;
inline uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }

// Numbers in -8 .. 8.
inline Bytes random_floats(int64_t count, FloatType type) {
  Bytes bytes(size_t(count * float_size(type)));
  for (int64_t i = 0; i < count; ++i) {
    write_float(bytes.data(), type, i, float(random_bits()) * 0x1p-20f - 8.0f);
  }
  return bytes;
}

inline int failures = 0;
inline void report(const char* name, long size, bool same) {
  failures += !same;
  if (!same) printf("FAIL %s, %ld\n", name, size);
}
inline void require(const LaunchStatus& status) {
  if (status.error != 0) throw std::runtime_error(status.kernel);
}

// Seed of the order of threads, then the checks.
inline int run(int count, char** arguments, void (*checks)()) {
  if (count > 1) emulation::set_seed(strtoull(arguments[1], nullptr, 10));
  try {
    checks();
  } catch (const std::exception& error) {
    printf("FAIL %s\n", error.what());
    return 2;
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace ow::check
