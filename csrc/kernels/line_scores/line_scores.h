// How much attention the last queries of a sequence pay to each key, and to each distance:
//
//   A[i,j] = softmax_j(scale * q_i . k_j), j <= p_i
//
//   columns[j]   = sum_i A[i, j]
//   diagonals[t] = sum_i A[i, p_i - t]
//
// over the last w = min(probes, sq, sk) queries i, which are at p_i = sk - w .. sk - 1, for each
// query head; head x reads key head x // (heads / kv_heads). Both sum up to w. They are
// the vertical and slash lines of MInference (Jiang et al., 2024), and the profiles of FlexPrefill.
//
// Queries are lanes, 64 of them a panel, so that a product's operands are a key's elements,
// broadcast, and lines of the transposed panel; softmax needs no sum across lanes; and a key's
// weights, one vector a line, are neighbours on a diagonal. Weights of a panel are kept, 256 bytes
// a key, in place of a second product.
#pragma once

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/sequences.h"
#include "core/types.h"

namespace ow {

constexpr int64_t kProbePanel = 64;
// Keys whose weights share a largest score: 32 KiB of them.
constexpr int64_t kProbeChunk = 128;
// A product of AMX takes 32 elements of bf16; panels of pairs are padded to that with zeros.
constexpr int64_t kProbeDepth = 32;

// Where the element (b, token, head, 0) of q or k is; strides in elements, the last 1.
struct ProbeStrides {
  int64_t b, token, head;
};

struct LineScoresArgs {
  int64_t heads, kv_heads, d, probes;
  Sequences queries, keys;
  FloatType type;
  float scale;
  const void* q;
  ProbeStrides q_strides;
  const void* k;
  ProbeStrides k_strides;
  int64_t max_keys;
  float* columns;    // [sequences, heads, max_keys]; 0 past the keys
  float* diagonals;  // alike
  float* scratch;    // line_scores_scratch floats
};

// Floats of scratch for one task, 64-byte pieces in the order of their use.
struct ProbeScratch {
  int64_t panel, weights, chunks, bands;
};
OW_INLINE ProbeScratch probe_scratch(const LineScoresArgs& a) {
  const int64_t chunks = div_up(a.max_keys, kProbeChunk);
  return {round_up(a.d, kProbeDepth) * kProbePanel, chunks * kProbeChunk * kProbePanel,
          2 * chunks * kProbePanel, 16 * (round_up(a.max_keys, 16) + 2 * kProbePanel)};
}
OW_INLINE int64_t scratch_of_task(const LineScoresArgs& a) {
  const ProbeScratch s = probe_scratch(a);
  return s.panel + s.weights + s.chunks + s.bands;
}

// Lines of units [begin, end), in order of sequence, then head; with scratch of one task.
using LineScoresFn = void (*)(const LineScoresArgs&, float* scratch, int64_t begin, int64_t end);

OW_INLINE constexpr int32_t probe_key(FloatType type) { return int32_t(type); }

#define OW_LINE_SCORES_EACH_TYPE(X, isa, fn)    \
  X(isa, probe_key(FloatType::f32), kAnyM, fn)  \
  X(isa, probe_key(FloatType::bf16), kAnyM, fn) \
  X(isa, probe_key(FloatType::f16), kAnyM, fn)

#define OW_LINE_SCORES_KERNELS(X)                                                                 \
  OW_IF_AVX512AMX(X(avx512amx, probe_key(FloatType::bf16), kAnyM, line_scores_bf16_avx512amx))    \
  OW_IF_AVX512BF16(X(avx512bf16, probe_key(FloatType::bf16), kAnyM, line_scores_bf16_avx512bf16)) \
  OW_IF_AVX512(OW_LINE_SCORES_EACH_TYPE(X, avx512, line_scores_avx512))                           \
  OW_IF_AVX2(OW_LINE_SCORES_EACH_TYPE(X, avx2, line_scores_avx2))                                 \
  OW_LINE_SCORES_EACH_TYPE(X, scalar, line_scores_scalar)

#define OW_DECLARE(isa, key, max_m, fn) void fn(const LineScoresArgs&, float*, int64_t, int64_t);
OW_LINE_SCORES_KERNELS(OW_DECLARE)
#undef OW_DECLARE

int64_t line_scores_scratch(const LineScoresArgs& args, const Parallel& parallel);
void line_scores(const LineScoresArgs& args, Isa isa, const Parallel& parallel);

}  // namespace ow
