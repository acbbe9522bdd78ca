// Scores of blocks of keys, from their means or from a few of their elements.
//
//   means[s, x, c] = mean of x[token] over the tokens of block c of sequence s
//
// and the tree search of HiP (Lee et al., "A training-free sub-quadratic cost transformer model
// serving framework with hierarchically pruned attention", 2024). For each block of queries, the
// candidates are the blocks of keys before the window, whose keys all its queries see. They are cut
// into k groups of neighbours; in each round every group is halved, a half is scored by its first
// block, and of the 2 k halves the k best stay, until all are single blocks:
//
//   score(block c) = max over queries p and keys j of block c of q_p . k_j
//     queries: every query_stride-th of the row        keys: every key_stride-th of the block
//
// so log2(candidates / k) rounds score at most 2 k blocks each, and half of those were scored the
// round before: the first half of a group begins as the group does.
#pragma once

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/sequences.h"
#include "core/types.h"

namespace ow {

struct BlockMeansArgs {
  int64_t heads, d, block, max_blocks;
  Sequences tokens;
  FloatType type;
  const void* x;
  int64_t stride_b, stride_token, stride_head;  // elements
  float* means;                                 // [sequences, heads, max_blocks, d]
};

struct HipSearchArgs {
  int64_t heads, kv_heads, d;
  int64_t block_m, block_n, k, query_stride, key_stride;
  int64_t max_rows, max_blocks;
  Sequences queries, keys;
  FloatType type;
  float sign;  // of the softmax scale: where it is negative the smallest product is best
  const void* q;
  int64_t q_stride_b, q_stride_token, q_stride_head;
  const void* k_data;
  int64_t k_stride_b, k_stride_token, k_stride_head;
  const int32_t* windows;  // [heads]
  uint8_t* blocks;         // [sequences, heads, max_rows, max_blocks]: the search's choice
  int32_t* scored;         // [sequences, heads, max_rows]: blocks whose score was computed
  float* sampled;          // [sequences, kv_heads, max_blocks, keys sampled of a block, d]
  uint8_t* scratch;        // hip_search_scratch bytes
};

// The queries of one row, scored together: every query_stride-th, the last one repeated up to a
// multiple of the widest vector.
struct SearchRow {
  const void* q;   // the row's first query
  const float* k;  // the sampled keys of its sequence and head
  int64_t queries, lanes;
  float* packed;  // [d, lanes]
};
OW_INLINE int64_t sampled_keys(const HipSearchArgs& a) { return div_up(a.block_n, a.key_stride); }

struct BlockScoresKernels {
  // Blocks [begin, end) of all sequences' and heads' [sequences, heads, max_blocks].
  void (*means)(const BlockMeansArgs&, int64_t begin, int64_t end);
  // Sampled keys of blocks [begin, end) of [sequences, kv_heads, max_blocks].
  void (*sample)(const HipSearchArgs&, int64_t begin, int64_t end);
  void (*pack)(const HipSearchArgs&, const SearchRow&);
  // Scores of `count` blocks.
  void (*score)(const HipSearchArgs&, const SearchRow&, const int32_t* blocks, int64_t count,
                float* scores);
};

#define OW_BLOCK_SCORES_KERNELS(X)                       \
  OW_IF_AVX512(X(avx512, 0, kAnyM, block_scores_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, block_scores_avx2))       \
  X(scalar, 0, kAnyM, block_scores_scalar)

#define OW_DECLARE(isa, key, max_m, kernels) extern const BlockScoresKernels kernels;
OW_BLOCK_SCORES_KERNELS(OW_DECLARE)
#undef OW_DECLARE

void block_means(const BlockMeansArgs& args, Isa isa, const Parallel& parallel);
// Elements of `sampled`, and bytes of `scratch`.
int64_t hip_search_samples(const HipSearchArgs& args);
int64_t hip_search_scratch(const HipSearchArgs& args, const Parallel& parallel);
void hip_search(const HipSearchArgs& args, Isa isa, const Parallel& parallel);

}  // namespace ow
