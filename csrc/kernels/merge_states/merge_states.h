// Joins attention over two sets of keys, each given as its output o and lse = ln sum_j e^s_j:
//
//   lse[r] = ln(e^lse1[r] + e^lse2[r])     o[r] = e^(lse1[r] - lse[r]) o1[r] + e^(lse2[r] - lse[r])
//   o2[r]
//
// A side without keys, lse = -inf, leaves the other as it is, to the bit; two of them give o = 0
// and lse = -inf. Bound by memory.
#pragma once

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

struct MergeStatesArgs {
  int64_t rows, d;
  FloatType type;
  const void* o1;  // [rows, d]
  const float* lse1;
  const void* o2;
  const float* lse2;
  void* o;
  float* lse;
};

// Rows [begin, end).
using MergeStatesFn = void (*)(const MergeStatesArgs&, int64_t begin, int64_t end);

#define OW_MERGE_STATES_KERNELS(X)                       \
  OW_IF_AVX512(X(avx512, 0, kAnyM, merge_states_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, merge_states_avx2))       \
  X(scalar, 0, kAnyM, merge_states_scalar)

#define OW_DECLARE(isa, key, max_m, fn) void fn(const MergeStatesArgs&, int64_t, int64_t);
OW_MERGE_STATES_KERNELS(OW_DECLARE)
#undef OW_DECLARE

void merge_states(const MergeStatesArgs& args, Isa isa, const Parallel& parallel);

}  // namespace ow
