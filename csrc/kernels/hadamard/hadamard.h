// The Walsh-Hadamard transform of blocks of a row:
//
//   y[b,i] = 1 / sqrt(block) * sum_j (-1)^popcount(i & j) x[b,j]       i, j = 0 .. block - 1
//
//   x, y [blocks, block] float32, bfloat16 or float16; sums in fp32
//
// The matrix is symmetric and orthogonal, so it is its own inverse. It is the product of
// log2(block) stages, of which stage h = 1, 2, 4 .. block / 2 turns elements i and i + h, where i
// has no bit h, into their sum and difference. All kernels take the stages in this order, so their
// results are equal to the bit.
//
// One sum or difference an element and stage; bound by memory as soon as several stages share one
// pass through registers.
#pragma once

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

// Of a block: what a kernel's fp32 scratch holds.
constexpr int64_t kMaxHadamard = 32768;

struct HadamardArgs {
  int64_t blocks;
  int64_t block;  // a power of two
  FloatType type;
  const void* x;
  void* y;      // not x
  float scale;  // 1 / sqrt(block)
};

// Blocks [begin, end).
using HadamardFn = void (*)(const HadamardArgs&, int64_t begin, int64_t end);

#define OW_HADAMARD_KERNELS(X)                       \
  OW_IF_AVX512(X(avx512, 0, kAnyM, hadamard_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, hadamard_avx2))       \
  X(scalar, 0, kAnyM, hadamard_scalar)

#define OW_DECLARE(isa, key, max_m, fn) void fn(const HadamardArgs&, int64_t, int64_t);
OW_HADAMARD_KERNELS(OW_DECLARE)
#undef OW_DECLARE

void hadamard(const HadamardArgs& args, Isa isa, const Parallel& parallel);

}  // namespace ow
