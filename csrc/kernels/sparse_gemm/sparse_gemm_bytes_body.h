// Columns given by bytes, over panels of up to 32 tokens. A value is a load of its column and, for
// each vector of tokens, a load and a multiply-add. So narrow a panel lets x of a whole block, 256
// columns, lie in an L1 cache, and a row of a block has values enough to make up for the end of its
// loop: 26 where a tenth is stored.
#pragma once

#include "kernels/sparse_gemm/sparse_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kBytesTokens = 32;
constexpr int64_t kBytesPanels = 8;

// Adds a row of a block to its sums: sums[t] += sum_j value_j * x[column_j, t]. A tier may have a
// better one, which may read four values and columns at a time.
struct AddByteByByte {
  template <int kVecs>
  OW_INLINE void add_row(const float* value, const uint8_t* column, int64_t count, const float* x,
                         float* sums) {
    VecF acc[kVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) acc[v] = load(sums + v * kLanes);
    for (int64_t i = 0; i < count; ++i) {
      const VecF w = set1(value[i]);
      const float* tokens = x + column[i] * (kVecs * kLanes);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) acc[v] = fma(w, load(tokens + v * kLanes), acc[v]);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) store(sums + v * kLanes, acc[v]);
  }
};

// Sums of panels [first, last), at most kBytesPanels, over all of k; x is one panel of tokens.
template <int kVecs, class Add>
void sum_bytes(const SparseGemmArgs& a, const float* x, int64_t first, int64_t last, float* sums) {
  constexpr int64_t kWidth = kVecs * kLanes;
  const SparsePattern& w = a.w;
  const int64_t size = value_size(a.value_type);
  memset(sums, 0, size_t((last - first) * kSparsePanel * kWidth) * sizeof(float));
  float buffer[kSparsePanel * kBytesK];
  for (int64_t b = 0; b < w.k_blocks; ++b, x += kBytesK * kWidth) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t block = panel * w.k_blocks + b;
      const int64_t offset = w.offsets[block];
      const uint8_t* counts = block_counts(w, block);
      const uint8_t* column = counts + kCountBytes;
      const float* value = decode_block(
          a, offset,
          [counts] {
            int64_t sum = 0;
            for (int64_t r = 0; r < kSparsePanel; ++r) sum += row_count(counts, r);
            return sum;
          },
          buffer);
      // As rows go by, what lies there in the panel's next block is fetched.
      const int64_t ahead = b + 1 < w.k_blocks ? w.offsets[block + 1] - offset : 0;
      const char* next = static_cast<const char*>(a.values) + (offset + ahead) * size;
      float* row = sums + (panel - first) * kSparsePanel * kWidth;
      for (int64_t r = 0; r < kSparsePanel; ++r, row += kWidth) {
        const int64_t count = row_count(counts, r);
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
        __builtin_prefetch(column + ahead + kCountBytes);
        Add::template add_row<kVecs>(value, column, count, x, row);
        value += count;
        column += count;
        next += count * size;
      }
    }
  }
}

template <class Add>
void run_bytes(const SparseGemmArgs& a, int64_t begin, int64_t end, float* tile) {
  for (int64_t panel = begin; panel < end; panel += kBytesPanels) {
    const int64_t last = min_of(panel + kBytesPanels, end);
    for_each_token_panel(a.m, kBytesTokens, [&](int64_t first, int64_t rows, int64_t width) {
      const float* x = a.x + first * k_padded_of(a.w);
      if (width == 16) {
        sum_bytes<16 / kLanes, Add>(a, x, panel, last, tile);
      } else {
        sum_bytes<32 / kLanes, Add>(a, x, panel, last, tile);
      }
      finish_tile(a, panel * kSparsePanel, min_of(last * kSparsePanel, a.w.n), first, rows, width,
                  tile);
    });
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
