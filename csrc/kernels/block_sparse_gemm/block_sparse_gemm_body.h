// The kernel in terms of simd/vec.h; each block_sparse_gemm_<tier>.cpp with vectors compiles it
// once.
#pragma once

#include "kernels/block_sparse_gemm/block_sparse_gemm.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Rows x two vectors of sums, the two vectors of the weight and a broadcast fill the registers: 14
// of 32 on AVX-512, 6 of 16 on AVX2. Both hide the latency of the multiply-add, 8 to 10 in flight.
constexpr int kTileRows = kLanes == 16 ? 14 : 6;

// Tiles of x that stay in L2 while rows of blocks come by: half of 2 MiB.
constexpr int64_t kChunkBytes = 1024 * 1024;

template <class T, int kVecs>
OW_INLINE void finish_row(const BlockSparseGemmArgs& a, int64_t i, int64_t n, const VecF* sums) {
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
    const int64_t column = n + v * kLanes;
    const int64_t lanes = min_of(kLanes, a.n - column);
    if (lanes <= 0) return;  // the last block may be mostly padding
    VecF value = sums[v];
    if (a.scales != nullptr) value = mul(value, load_n(a.scales + column, lanes));
    if (a.bias != nullptr) {
      value = add(value, load_n(static_cast<const T*>(a.bias) + column, lanes));
    }
    const int64_t at = i * a.n + column;
    if (a.add != nullptr) value = add(value, load_n(static_cast<const T*>(a.add) + at, lanes));
    store_n(static_cast<T*>(a.y) + at, value, lanes);
  }
}

// Outputs [n, n + kVecs * kLanes) of row of blocks `row`, for a tile that starts at row `first` of
// x.
template <class W, int kVecs, int kRows>
void multiply_tile(const BlockSparseGemmArgs& a, int64_t row, int64_t n, int64_t first,
                   const float* x) {
  VecF sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) sums[i][v] = set1(0.0f);
  }
  const W* values = static_cast<const W*>(a.values) + (n - row * a.block);
  for (int64_t b = a.indptr[row]; b < a.indptr[row + 1]; ++b) {
    const W* w = values + b * a.block * a.block;
    const float* columns = x + a.indices[b] * a.block * kRows;
    for (int64_t c = 0; c < a.block; ++c, w += a.block, columns += kRows) {
      VecF outputs[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) outputs[v] = load(w + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const VecF broadcast = set1(columns[i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) sums[i][v] = fma(outputs[v], broadcast, sums[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (first + i >= a.m) break;
    switch (a.y_type) {
      case FloatType::f32: finish_row<float, kVecs>(a, first + i, n, sums[i]); break;
      case FloatType::bf16: finish_row<bf16, kVecs>(a, first + i, n, sums[i]); break;
      case FloatType::f16: finish_row<f16, kVecs>(a, first + i, n, sums[i]); break;
    }
  }
}

template <class W, int kVecs>
OW_INLINE void multiply_rows(const BlockSparseGemmArgs& a, int64_t row, int64_t n, int64_t first) {
  const float* x = a.x + first * a.k_padded;
  switch (tile_rows(min_of(kTileRows, a.m - first), kTileRows)) {
    case 1: return multiply_tile<W, kVecs, 1>(a, row, n, first, x);
    case 2: return multiply_tile<W, kVecs, 2>(a, row, n, first, x);
    case 4: return multiply_tile<W, kVecs, 4>(a, row, n, first, x);
    case kTileRows: return multiply_tile<W, kVecs, kTileRows>(a, row, n, first, x);
    default: return multiply_tile<W, kVecs, 8>(a, row, n, first, x);
  }
}

template <class W, int kVecs>
void run_blocks(const BlockSparseGemmArgs& a, int64_t begin, int64_t end) {
  const int64_t tile_bytes = kTileRows * a.k_padded * int64_t(sizeof(float));
  const int64_t tiles = kChunkBytes / tile_bytes > 0 ? kChunkBytes / tile_bytes : 1;
  for (int64_t chunk = 0; chunk < a.m; chunk += tiles * kTileRows) {
    const int64_t chunk_end = min_of(chunk + tiles * kTileRows, a.m);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n_end = min_of((row + 1) * a.block, a.n);
      for (int64_t n = row * a.block; n < n_end; n += kVecs * kLanes) {
        for (int64_t first = chunk; first < chunk_end; first += kTileRows) {
          multiply_rows<W, kVecs>(a, row, n, first);
        }
      }
    }
  }
}

template <class W>
void run_typed(const BlockSparseGemmArgs& a, int64_t begin, int64_t end) {
  const bool narrow = a.block < 2 * kLanes;
  return narrow ? run_blocks<W, 1>(a, begin, end) : run_blocks<W, 2>(a, begin, end);
}

void run(const BlockSparseGemmArgs& a, int64_t begin, int64_t end) {
  switch (a.value_type) {
    case ValueType::f32: return run_typed<float>(a, begin, end);
    case ValueType::bf16: return run_typed<bf16>(a, begin, end);
    case ValueType::i8: return run_typed<int8_t>(a, begin, end);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
