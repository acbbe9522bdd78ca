// Multiply by a weight of which whole square blocks are stored (block-sparse, BSR):
//
//   y[i,n] = bias[n] + add[i,n] + scale[n] * sum_b sum_{c < B} w_b[c, n % B] * x[i, B j_b + c]
//
//   b    the stored blocks of row n / B of blocks        B  16, 32 or 64
//   j_b  which column of blocks b is
//   w_b  fp32, bf16, or int8 with a scale a row (1 where `scales` is null); x is not rounded to
//   int8
//
// Layouts blocks_n16k16, blocks_n32k32, blocks_n64k64. A row of blocks is B outputs; elements past
// n and k are zero.
//
//   indptr   [row_blocks + 1] int32: row r has blocks indptr[r] .. indptr[r + 1] - 1
//   indices  [blocks] int32: j_b, ascending in a row
//   values   [blocks, B, B]: k by k, the B outputs of one k together
//
//   block:  | k 0: n0 n1 ... n(B-1) | k 1: n0 n1 ... | ... |
//
// So a block is a dense matrix product of its own, with vectors of outputs and a broadcast of x,
// and the sums of a tile of outputs and rows stay in registers over all blocks of a row. The sum of
// an output runs over k in order, whatever the tile.
//
// x arrives in tiles of rows, each [k_padded, rows], zero past m and k: the broadcasts of one k lie
// together, where rows a power of two apart would fight for the same cache sets.
#pragma once

#include "core/kernel_table.h"
#include "core/layout.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

struct BlockSparseGemmArgs {
  int64_t m, n, k, block;
  int64_t row_blocks, k_padded;
  const int32_t* indptr;
  const int32_t* indices;
  const void* values;
  ValueType value_type;
  const float* scales;  // [n], or null
  const float* x;       // in tiles of the kernel's rows
  const void* bias;     // [n] of y_type, or null
  const void* add;      // [m, n] of y_type, contiguous, or null
  void* y;              // [m, n] of y_type, contiguous
  FloatType y_type;
};

struct BlockSparseGemmKernel {
  // y of rows of blocks [begin, end).
  void (*run)(const BlockSparseGemmArgs&, int64_t begin, int64_t end);
  int64_t rows;  // of a tile of x
};

#define OW_BLOCK_SPARSE_GEMM_KERNELS(X)                             \
  OW_IF_AVX512(X(avx512, 0, kAnyM, block_sparse_gemm_14x32_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, block_sparse_gemm_6x16_avx2))        \
  X(scalar, 0, kAnyM, block_sparse_gemm_scalar)

#define OW_DECLARE(isa, key, max_m, kernel) extern const BlockSparseGemmKernel kernel;
OW_BLOCK_SPARSE_GEMM_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// Rows of a tile of which `rows` are in use: as many as a kernel is made for.
OW_INLINE int64_t tile_rows(int64_t rows, int64_t widest) {
  for (int64_t made = 1; made < widest; made *= 2) {
    if (rows <= made) return made;
  }
  return widest;
}

// The product of x [m, k] of y_type; `scratch` has as many floats as block_sparse_scratch says.
int64_t block_sparse_scratch(const BlockSparseGemmArgs& args, Isa isa);
void block_sparse_gemm(BlockSparseGemmArgs args, const void* x, Isa isa, float* scratch,
                       const Parallel& parallel);

// Between weight [n, k], dense, and the blocks that indptr and indices name; elements of `size`
// bytes. Expanding leaves zeros where no block is.
struct BlockSparsePackArgs {
  int64_t n, k, block, row_blocks, size;
  const int32_t* indptr;
  const int32_t* indices;
};
void compress_blocks(const BlockSparsePackArgs& args, const void* weight, void* values,
                     const Parallel& parallel);
void expand_blocks(const BlockSparsePackArgs& args, const void* values, void* weight,
                   const Parallel& parallel);

}  // namespace ow
