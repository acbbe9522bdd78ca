// Multiply by a weight of which any elements are stored (unstructured sparsity):
//
//   y[i,n] = bias[n] + add[i,n] + scale[n] * sum_{k stored in row n} w[n,k] * x[i,k]
//
//   w  fp32, bf16, or int8 with a scale a row (1 where `scales` is null)
//
// x is not rounded to int8 beside int8 values: few rows are bound by the bytes of the weight, which
// that would not change, and many rows multiply each value as a float that was decoded once.
//
// Two layouts. A panel is 16 outputs, a block of it 64 or 256 k; rows past n are empty. Both have
//
//   offsets  [panels, k_blocks] int32: where the values of a block begin
//   values   [nnz + 16 block_k]: blocks in order of panel, then k; in a block row after row, in a
//            row ascending k; then zeros
//
// and an index, which says what k the values of a row have:
//
//   bitmask_n16k64   [panels, k_blocks, 16] 64 bits: bit j of row r is set where
//                    w[16p + r, 64b + j] is stored
//   bytes_n16k256    [32 panels k_blocks + nnz + 4096] bytes: of each block 16 x 16 bits, how many
//                    values the rows have, and a byte a value, k - 256b; then zeros. A block's
//                    begin at 32 (blocks before it) + its offset.
//
//   bitmask block:  | masks of row 0 .. 15 |
//   bytes block:    | counts 3 1 ... 2 | row 0: k k k | row 1: k | ... | row 15: k k |
//   values:                            | row 0: w w w | row 1: w | ... | row 15: w w |
//
// Bytes are fewer below a density of an eighth, and need no decoding.
//
// A block has at most 16 block_k values from its offset on, so with every offset in 0 .. nnz no
// mask and no count, of which kernels take at most 256, can lead a kernel out of `values` or the
// index, and no byte out of a block's columns. One order serves all row counts: for few rows a
// thread streams its panels once, front to back; for many, the blocks of one k_block meet tokens
// that stay in the L1 cache.
#pragma once

#include "core/kernel_table.h"
#include "core/layout.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

constexpr int64_t kSparsePanel = 16;
// Of bitmask_n16k64 and of bytes_n16k256.
constexpr int64_t kMaskK = 64;
constexpr int64_t kBytesK = 256;
constexpr int64_t kCountBytes = 2 * kSparsePanel;

enum class ValueType : int32_t { f32, bf16, i8 };

OW_INLINE int64_t value_size(ValueType type) {
  return type == ValueType::f32 ? 4 : type == ValueType::bf16 ? 2 : 1;
}

// Where elements are, apart from their values. One of masks and bytes is the index, the other null.
struct SparsePattern {
  int64_t n, k, panels, block_k, k_blocks;
  const uint64_t* masks;
  const uint8_t* bytes;
  const int32_t* offsets;
};

OW_INLINE SparsePattern sparse_pattern(int64_t n, int64_t k, Layout layout) {
  const int64_t block_k = layout == Layout::bytes_n16k256 ? kBytesK : kMaskK;
  return {n, k, div_up(n, kSparsePanel), block_k, div_up(k, block_k), nullptr, nullptr, nullptr};
}
OW_INLINE void set_index(SparsePattern* w, const void* index) {
  w->masks = w->block_k == kMaskK ? static_cast<const uint64_t*>(index) : nullptr;
  w->bytes = w->block_k == kBytesK ? static_cast<const uint8_t*>(index) : nullptr;
}
OW_INLINE int64_t k_padded_of(const SparsePattern& w) { return w.k_blocks * w.block_k; }
// Elements of a block, and so of the padding of `values`.
OW_INLINE int64_t block_size_of(const SparsePattern& w) { return kSparsePanel * w.block_k; }
OW_INLINE int64_t index_bytes_of(const SparsePattern& w, int64_t nnz) {
  const int64_t blocks = w.panels * w.k_blocks;
  return w.block_k == kMaskK ? blocks * kSparsePanel * 8
                             : blocks * kCountBytes + nnz + block_size_of(w);
}

// The counts of a block of bytes, which its columns follow.
OW_INLINE const uint8_t* block_counts(const SparsePattern& w, int64_t block) {
  return w.bytes + block * kCountBytes + w.offsets[block];
}
OW_INLINE int64_t row_count(const uint8_t* counts, int64_t r) {
  uint16_t count;
  memcpy(&count, counts + 2 * r, 2);
  return min_of(int64_t(count), kBytesK);
}

// Calls body(place in `values`, row of the panel, k in the block) for each value of a block.
template <class Body>
OW_INLINE void for_each_stored(const SparsePattern& w, int64_t block, const Body& body) {
  int64_t value = w.offsets[block];
  if (w.masks != nullptr) {
    for (int64_t r = 0; r < kSparsePanel; ++r) {
      uint64_t mask = w.masks[block * kSparsePanel + r];
      for (; mask != 0; mask &= mask - 1) body(value++, r, int64_t(__builtin_ctzll(mask)));
    }
    return;
  }
  const uint8_t* counts = block_counts(w, block);
  const uint8_t* column = counts + kCountBytes;
  for (int64_t r = 0; r < kSparsePanel; ++r) {
    const int64_t end = value + row_count(counts, r);
    while (value < end) body(value++, r, int64_t(*column++));
  }
}

// x as a kernel reads it. Rows: [k_padded / 16, m, 16] floats, zero past k: what few rows need at a
// time lies together, where rows a power of two apart would fight for the same cache sets (as many
// bytes in another order for a kernel that wants one, with a prepare of its own). Tokens:
// panels of up to `widest` rows of x, transposed, each [k_padded, width] with width 16, 32, 64 or
// 128, zero past m and k: a stored w then meets a panel row, one load for each vector of tokens,
// and no gather.
struct SparseXArgs {
  const void* x;  // [m, k] of type
  FloatType type;
  int64_t m, k, k_padded;
  int64_t widest;  // panel of tokens; 0: rows
  float* out;
};
// Columns [begin, end) of x, multiples of 16.
using PrepareFn = void (*)(const SparseXArgs&, int64_t begin, int64_t end);

// Where element (i, k) of m rows is.
OW_INLINE int64_t row_place(int64_t m, int64_t i, int64_t k) {
  return (k / 16 * m + i) * 16 + k % 16;
}
constexpr int64_t kMaxTokens = 128;
OW_INLINE int64_t token_width(int64_t rows) {
  return rows > 64 ? 128 : rows > 32 ? 64 : rows > 16 ? 32 : 16;
}
// Rows of x [m, k] in panels: calls body(first row, rows, width) for each.
template <class Body>
OW_INLINE void for_each_token_panel(int64_t m, int64_t widest, const Body& body) {
  for (int64_t i = 0; i < m; i += widest) {
    const int64_t rows = min_of(widest, m - i);
    body(i, rows, min_of(widest, token_width(rows)));
  }
}

// Outputs whose sums a task holds at a time: 512 KiB of fp32 for 128 tokens, a quarter of an L2.
constexpr int64_t kTileRows = 1024;

struct SparseGemmArgs {
  int64_t m;
  SparsePattern w;
  int64_t nnz;  // stored values
  const void* values;
  ValueType value_type;
  const float* scales;  // [n], or null
  const float* x;       // as the kernel reads it
  const void* bias;     // [n] of y_type, or null
  const void* add;      // [m, n] of y_type, contiguous, or null
  void* y;              // [m, n] of y_type, contiguous
  FloatType y_type;
};

struct SparseGemmKernel {
  // y of panels [begin, end); tile [min(kTileRows, 16 * (end - begin)), widest] is scratch.
  void (*run)(const SparseGemmArgs&, int64_t begin, int64_t end, float* tile);
  PrepareFn prepare;
  int64_t widest;  // panel of tokens; 0: x is rows
};

// Rows up to which selecting the x of a mask's values, or expanding the values, may beat visiting
// them one by one; which does depends on how many are stored (sparse_gemm.cpp).
constexpr int64_t kSelectMaxRows = 1;
constexpr int64_t kExpandMaxRows = 16;
// Rows up to which masks are better sorted before their values are visited.
constexpr int64_t kSortMaxRows = 32;

// Rows up to which x is selected for the columns of bytes.
constexpr int64_t kSelectBytesMaxRows = 2;

// What a kernel reads: its layout.
constexpr int32_t kMasks = int32_t(Layout::bitmask_n16k64);
constexpr int32_t kBytes = int32_t(Layout::bytes_n16k256);

#define OW_SPARSE_GEMM_KERNELS(X)                                                     \
  OW_IF_AVX512(X(avx512, kMasks, kSelectMaxRows, sparse_gemm_select_avx512))          \
  OW_IF_AVX512(X(avx512, kMasks, kExpandMaxRows, sparse_gemm_expand_avx512))          \
  OW_IF_AVX512(X(avx512, kMasks, kSortMaxRows, sparse_gemm_sorted_avx512))            \
  OW_IF_AVX512(X(avx512, kMasks, kAnyM, sparse_gemm_tokens_avx512))                   \
  OW_IF_AVX512(X(avx512, kBytes, kSelectBytesMaxRows, sparse_gemm_bytes_rows_avx512)) \
  OW_IF_AVX512(X(avx512, kBytes, kAnyM, sparse_gemm_bytes_avx512))                    \
  OW_IF_AVX2(X(avx2, kMasks, kAnyM, sparse_gemm_tokens_avx2))                         \
  OW_IF_AVX2(X(avx2, kBytes, kAnyM, sparse_gemm_bytes_avx2))                          \
  X(scalar, kMasks, kAnyM, sparse_gemm_rows_scalar)                                   \
  X(scalar, kBytes, kAnyM, sparse_gemm_bytes_scalar)

#define OW_DECLARE(isa, key, max_m, kernel) extern const SparseGemmKernel kernel;
OW_SPARSE_GEMM_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// Floats that the prepared x takes.
int64_t sparse_x_count(int64_t m, int64_t k_padded, int64_t widest);

// The product of x [m, k] of y_type. `scratch` has as many floats as sparse_gemm_scratch says.
int64_t sparse_gemm_scratch(const SparseGemmArgs& args, Isa isa, int64_t threads);
void sparse_gemm(SparseGemmArgs args, const void* x, Isa isa, float* scratch,
                 const Parallel& parallel);

// Gradient of the stored values, a product of dense matrices sampled where values are:
//
//   grad[p] = sum_i g[i,n] * x[i,k]      for the stored value p at (n, k)
struct SampledGemmArgs {
  int64_t m;
  SparsePattern w;
  const float* g;  // [m, n] and
  const float* x;  // [m, k] as panels of tokens, or rows
  float* grad;     // as long as `values`, zeroed
};
struct SampledGemmKernel {
  void (*run)(const SampledGemmArgs&, int64_t begin, int64_t end);  // panels
  PrepareFn prepare;
  int64_t widest;
};

#define OW_SAMPLED_GEMM_KERNELS(X)                       \
  OW_IF_AVX512(X(avx512, 0, kAnyM, sampled_gemm_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, sampled_gemm_avx2))       \
  X(scalar, 0, kAnyM, sampled_gemm_scalar)

#define OW_DECLARE(isa, key, max_m, kernel) extern const SampledGemmKernel kernel;
OW_SAMPLED_GEMM_KERNELS(OW_DECLARE)
#undef OW_DECLARE

int64_t sampled_gemm_scratch(int64_t m, const SparsePattern& w, Isa isa);
// g [m, n] and x [m, k] of one type.
void sampled_gemm(SampledGemmArgs args, const void* g, const void* x, FloatType type, Isa isa,
                  float* scratch, const Parallel& parallel);

// Packing. `keep` [n, k] bytes says which elements are stored; null: those that are not zero.
struct SparsePackArgs {
  int64_t n, k;
  ValueType type;
  const void* weight;   // [n, k]
  const uint8_t* keep;  // or null
};
// Offsets, and the number of values. Counts past 2^31 - 1 are returned, their offsets wrong.
int64_t sparse_offsets_of(const SparsePackArgs& args, const SparsePattern& pattern,
                          int32_t* offsets, const Parallel& parallel);
// The index, zeroed, of a pattern that has offsets.
void sparse_index_of(const SparsePackArgs& args, const SparsePattern& pattern, void* index,
                     const Parallel& parallel);
// Values in the order of the layout.
void sparse_values_of(const SparsePackArgs& args, const SparsePattern& pattern, void* values,
                      const Parallel& parallel);
// The inverse, with zeros where nothing is stored.
void expand_sparse(const SparsePattern& pattern, ValueType type, const void* values, void* weight,
                   const Parallel& parallel);

}  // namespace ow
