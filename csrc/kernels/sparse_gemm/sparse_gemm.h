// Multiply by a weight of which any elements are stored (unstructured sparsity):
//
//   y[i,n] = bias[n] + add[i,n] + scale[n] * sum_{k stored in row n} w[n,k] * x[i,k]
//
//   w  fp32, bf16, or int8 with a scale a row (1 where `scales` is null)
//
// x is not rounded to int8 beside int8 values: few rows are bound by the bytes of the weight, which
// that would not change, and many rows multiply each value as a float that was decoded once.
//
// Layout bitmask_n16k64. A panel is 16 outputs, a block of it 64 k; rows past n are empty.
//
//   masks    [panels, k_blocks, 16] 64 bits: bit j of row r is set where w[16p + r, 64b + j] is
//            stored
//   offsets  [panels, k_blocks] int32: where the values of a block begin
//   values   [nnz + 1024]: blocks in order of panel, then k; in a block row after row, in a row
//            ascending k; then 1024 zeros
//
//   block:  | masks of row 0 .. 15 |     values: | row 0: w w w | row 1: w w | ... | row 15: w w w
//   |
//
// The masks of a block choose at most 1024 values from its offset on, so with every offset in
// 0 .. nnz no mask can lead a kernel out of `values`. One order serves all row counts: for few rows
// a thread streams its panels once, front to back; for many, the blocks of one k_block meet tokens
// that stay in the L1 cache.
#pragma once

#include "core/kernel_table.h"
#include "core/layout.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

constexpr int64_t kSparsePanel = 16;
constexpr int64_t kSparseBlockK = 64;
constexpr int64_t kSparseBlockSize = kSparsePanel * kSparseBlockK;

// Where elements are, apart from their values.
struct SparsePattern {
  int64_t n, k, panels, k_blocks;
  const uint64_t* masks;
  const int32_t* offsets;
};

OW_INLINE SparsePattern sparse_pattern(int64_t n, int64_t k) {
  return {n, k, div_up(n, kSparsePanel), div_up(k, kSparseBlockK), nullptr, nullptr};
}
OW_INLINE int64_t k_padded_of(const SparsePattern& w) { return w.k_blocks * kSparseBlockK; }

// x as a kernel reads it. Rows: [k_padded / 16, m, 16] floats, zero past k: what few rows need at a
// time lies together, where rows a power of two apart would fight for the same cache sets. Tokens:
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

#define OW_SPARSE_GEMM_KERNELS(X)                                       \
  OW_IF_AVX512(X(avx512, 0, kSelectMaxRows, sparse_gemm_select_avx512)) \
  OW_IF_AVX512(X(avx512, 0, kExpandMaxRows, sparse_gemm_expand_avx512)) \
  OW_IF_AVX512(X(avx512, 0, kSortMaxRows, sparse_gemm_sorted_avx512))   \
  OW_IF_AVX512(X(avx512, 0, kAnyM, sparse_gemm_tokens_avx512))          \
  OW_IF_AVX2(X(avx2, 0, kAnyM, sparse_gemm_tokens_avx2))                \
  X(scalar, 0, kAnyM, sparse_gemm_rows_scalar)

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
  float* grad;     // [nnz + 1024], zeroed
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
// Masks, offsets, and the number of values. Counts past 2^31 - 1 are returned, their offsets wrong.
int64_t sparse_pattern_of(const SparsePackArgs& args, uint64_t* masks, int32_t* offsets,
                          const Parallel& parallel);
// Values in the order of the layout.
void sparse_values_of(const SparsePackArgs& args, const SparsePattern& pattern, void* values,
                      const Parallel& parallel);
// The inverse, with zeros where nothing is stored.
void expand_sparse(const SparsePattern& pattern, ValueType type, const void* values, void* weight,
                   const Parallel& parallel);

}  // namespace ow
