// Attention of many queries, each block of which visits the keys that a list names:
//
//   o[i,h] = sum_j p_ij v[j,g]     p_ij = e^(s_ij - lse_ih)     s_ij = scale * q[i,h] . k[j,g]
//   lse[i,h] = ln sum_j e^s_ij     c[h,j] = sum_i p_ij, over the rows i that were asked for
//
// with g = h / (heads / kv_heads), j over the keys that are both listed for i and visible to it.
// Query i of a sequence is at position p = keys - queries + i. If `causal`, key j is visible where
// j <= p - min_distance and, if there is a window, p - j < window or j < sinks. A row without a key
// has o = 0 and lse = -inf.
//
// The index has a row of key blocks, and of single keys, for every block_m queries:
//
//   indptr [index_heads, rows + 1]    indices of head x and row r: indptr[x][r] .. indptr[x][r + 1]
//   indices [..]                      block c is the keys c * block_n .. (c + 1) * block_n - 1
//   column_indptr, columns            alike, of single keys; none inside a listed block
//
// How. Everything is a product of rows of numbers by a panel of kQueryTile queries: scores are keys
// by queries, the output is dimensions by queries, and queries are the lanes of vectors:
//
//   s^T [keys, 64] = K [keys, d] * Q^T [d, 64]       o^T [dv, 64] += V^T [dv, keys] * p^T [keys,
//   64]
//
// so that the maximum and the sum over keys need no exchange between lanes, and both products read
// their left side along its rows. K and V^T are laid out once for each key head, in units of
// kUnitKeys keys, and serve all of its query heads and blocks; or, where few tiles read a key (the
// last queries of a long sequence, a narrow window), each tile lays out what it reads. Heads of a
// group share a tile where one head would not fill it.
//
// Weights are e^(s - m), with m a maximum of the row so far; m moves only when a score exceeds it
// by kSlack (in powers of two), and the output is rescaled only then. Sums are fp32; the tiers for
// bf16 round weights to bf16.
//
// Column sums need the last lse: the weights of a tile are kept, times e^(m - lse) of their time.
#pragma once

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

// Queries of a tile: four vectors of AVX-512, as many as let one load of a key serve.
constexpr int64_t kQueryTile = 64;
// Keys laid out together, at positions 32 u .. 32 u + 31: the depth of an AMX product.
constexpr int64_t kUnitKeys = 32;

// Where the element (token, head, 0) is, from a sequence's first token; in elements.
struct TokenStrides {
  int64_t token, head;
};

struct AttentionSequence {
  int64_t queries, keys;
  int64_t q, k, v;    // elements before its first token
  int64_t row;        // first row of o, lse and score_rows
  int64_t scores;     // elements before its first key's score of head 0
  int64_t index_row;  // first row of the index
  int64_t unit;       // units of kUnitKeys keys of the sequences before it, of one head
};

// Which of the keys at or before it a query sees.
struct AttentionMask {
  bool causal;
  int64_t window, sinks, min_distance;
};

// Lists of one kind for all rows: of key blocks, or of single keys.
struct KeyLists {
  const int32_t* indptr;  // null: there is none
  const int32_t* items;
};

struct BlockAttentionArgs {
  int64_t heads, kv_heads, d, dv;
  FloatType type;
  float scale;
  AttentionMask mask;
  const AttentionSequence* sequences;
  int64_t sequence_count;
  const void* q;
  const void* k;
  const void* v;
  TokenStrides q_strides, k_strides, v_strides;
  // Without `blocks`: every key.
  int64_t index_heads, index_rows, block_m, block_n;
  KeyLists blocks, columns;
  void* o;                    // [rows, heads, dv]
  float* lse;                 // [rows, heads]
  const uint8_t* score_rows;  // [rows]: which count in `scores`; null: none
  float* scores;              // added to: c of a sequence's head h at scores + h * score_stride
  int64_t score_stride;
  // K and V^T: of each sequence, key head kv_begin .. kv_end - 1, unit. Null: each tile lays out
  // the units it reads.
  uint8_t* packed;
  int64_t packed_unit_bytes;
  int64_t kv_begin, kv_end;
};

struct KeyList {
  const int32_t* begin;
  const int32_t* end;
};

// Queries first .. first + count - 1 of a sequence, of heads head .. head + heads - 1, which read
// the same keys: row i of head number h is in lane h * count + i.
struct QueryTile {
  const AttentionSequence* sequence;
  int64_t head, heads, first, count;
  KeyList blocks, columns;
  float* scores;  // [keys], added to; null without, and for several heads
  // Of each lane: m, in powers of two, and the sum of e^(s - m), 0 where there is no key.
  float m[kQueryTile];
  float l[kQueryTile];
};

struct BlockAttentionKernels {
  // Bytes of a unit's keys and values, and of the memory of one thread.
  int64_t (*packed_unit_bytes)(const BlockAttentionArgs&);
  int64_t (*scratch_bytes)(const BlockAttentionArgs&);
  // Lays out units [begin, end), in order of sequence, key head, unit.
  void (*pack)(const BlockAttentionArgs&, int64_t begin, int64_t end);
  // o, m and l of a tile.
  void (*attend)(const BlockAttentionArgs&, QueryTile&, uint8_t* scratch);
};

#define OW_BLOCK_ATTENTION_EACH_TYPE(X, isa, kernels) \
  X(isa, int32_t(FloatType::f32), kAnyM, kernels)     \
  X(isa, int32_t(FloatType::bf16), kAnyM, kernels)    \
  X(isa, int32_t(FloatType::f16), kAnyM, kernels)

#define OW_BLOCK_ATTENTION_KERNELS(X)                                                            \
  OW_IF_AVX512AMX(X(avx512amx, int32_t(FloatType::bf16), kAnyM, block_attention_bf16_avx512amx)) \
  OW_IF_AVX512BF16(                                                                              \
      X(avx512bf16, int32_t(FloatType::bf16), kAnyM, block_attention_bf16_avx512bf16))           \
  OW_IF_AVX512(OW_BLOCK_ATTENTION_EACH_TYPE(X, avx512, block_attention_avx512))                  \
  OW_IF_AVX2(OW_BLOCK_ATTENTION_EACH_TYPE(X, avx2, block_attention_avx2))                        \
  OW_BLOCK_ATTENTION_EACH_TYPE(X, scalar, block_attention_scalar)

#define OW_DECLARE(isa, key, max_m, kernels) extern const BlockAttentionKernels kernels;
OW_BLOCK_ATTENTION_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// What a call needs besides its arguments.
struct BlockAttentionPlan {
  const BlockAttentionKernels* kernels;
  int64_t tasks;
  int64_t pass_heads;  // key heads laid out at a time
  int64_t packed_unit_bytes;
  int64_t packed_bytes;         // 0: `packed` must be null
  int64_t scratch_bytes;        // of one task
  int64_t partial_score_count;  // floats
};
BlockAttentionPlan plan_block_attention(const BlockAttentionArgs& args, Isa isa, int64_t threads);

// `scratch` has tasks * scratch_bytes, aligned to 64.
void block_attention(const BlockAttentionArgs& args, const BlockAttentionPlan& plan,
                     uint8_t* scratch, float* partial_scores, const Parallel& parallel);

// Gradients, from o and lse of the forward pass. With p as above, grad_o and grad_lse given:
//
//   delta_i  = o_i . grad_o_i - grad_lse_i          grad_v_j = sum_i p_ij grad_o_i
//   grad_p   = grad_o_i . v_j                       grad_q_i = sum_j ds_ij k_j
//   ds_ij    = scale * p_ij * (grad_p - delta_i)    grad_k_j = sum_i ds_ij q_i
//
// Weights are computed again. Tiles of queries are shared out in parts of a sequence and key head,
// whose number follows from the shapes alone: each adds up its own grad_k and grad_v, all heads of
// the group in order, and the parts are added in order, so no sum depends on the number of threads.
// Sums are fp32; the tiers for bf16 round p and ds to bf16, once they are known, as operands of the
// products that follow.
struct BlockAttentionBackwardArgs {
  BlockAttentionArgs forward;  // as it was called; o and lse are read
  const void* grad_o;          // [rows, heads, dv]
  const float* grad_lse;       // [rows, heads]
  void* grad_q;                // [rows, heads, d]
  void* grad_k;                // [rows of keys, kv_heads, d]
  void* grad_v;                // [rows of keys, kv_heads, dv]
};

// Sums of grad_k and grad_v of a unit of keys: panels of 64 dimensions, [panels, 32, 64].
OW_INLINE int64_t panels_of(int64_t d) { return div_up(d, kQueryTile); }
OW_INLINE int64_t sums_of_unit(const BlockAttentionArgs& a) {
  return (panels_of(a.d) + panels_of(a.dv)) * kUnitKeys * kQueryTile;
}

struct BlockAttentionBackwardKernels {
  // Bytes of a unit's keys and values, and of the memory of one thread.
  int64_t (*packed_unit_bytes)(const BlockAttentionArgs&);
  int64_t (*scratch_bytes)(const BlockAttentionArgs&);
  // Lays out units [begin, end), in order of sequence, key head, unit.
  void (*pack)(const BlockAttentionArgs&, int64_t begin, int64_t end);
  // Writes grad_q of a tile, and adds to the sums [units, sums_of_unit] of its keys.
  void (*tile)(const BlockAttentionBackwardArgs&, const QueryTile&, float* sums, uint8_t* scratch);
};

#define OW_BLOCK_ATTENTION_GRADIENTS(X)                                                         \
  OW_IF_AVX512BF16(                                                                             \
      X(avx512bf16, int32_t(FloatType::bf16), kAnyM, block_attention_backward_bf16_avx512bf16)) \
  OW_IF_AVX512(OW_BLOCK_ATTENTION_EACH_TYPE(X, avx512, block_attention_backward_avx512))        \
  OW_IF_AVX2(OW_BLOCK_ATTENTION_EACH_TYPE(X, avx2, block_attention_backward_avx2))              \
  OW_BLOCK_ATTENTION_EACH_TYPE(X, scalar, block_attention_backward_scalar)

#define OW_DECLARE(isa, key, max_m, kernels) extern const BlockAttentionBackwardKernels kernels;
OW_BLOCK_ATTENTION_GRADIENTS(OW_DECLARE)
#undef OW_DECLARE

struct BlockAttentionBackwardPlan {
  const BlockAttentionBackwardKernels* kernels;
  int64_t tasks;
  int64_t packed_unit_bytes, packed_bytes;
  int64_t scratch_bytes;  // of one task
  int64_t sum_count;      // floats
};
BlockAttentionBackwardPlan plan_block_attention_backward(const BlockAttentionArgs& args, Isa isa,
                                                         int64_t threads);

// `scratch` has tasks * scratch_bytes, and `sums` sum_count floats; both aligned to 64.
void block_attention_backward(const BlockAttentionBackwardArgs& args,
                              const BlockAttentionBackwardPlan& plan, uint8_t* scratch, float* sums,
                              const Parallel& parallel);

// Tiles of each head of a sequence; one of them, empty (count 0) where the last block of a sequence
// has fewer; the keys it reads, at most; and units of keys of all sequences and the key heads laid
// out.
int64_t attention_tiles(const BlockAttentionArgs& args, int64_t sequence);
QueryTile attention_tile(const BlockAttentionArgs& args, int64_t sequence, int64_t head,
                         int64_t index);
int64_t attention_tile_cost(const BlockAttentionArgs& args, const QueryTile& tile);
int64_t attention_units(const BlockAttentionArgs& args);

}  // namespace ow
