// Columns given by bytes, over panels of up to 32 tokens. A value is a load of its column and, for
// each vector of tokens, a load and a multiply-add. So narrow a panel lets x of a whole block, 256
// columns, lie in an L1 cache, and a row of a block has values enough to make up for the end of its
// loop: 26 where a tenth is stored.
#pragma once

#include "kernels/sparse_gemm/sparse_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kBytesTokens = 32;
// Panels whose sums a task holds at a time. Few for one panel of tokens: the sums stay in an L1
// cache beside x, and each panel of the weight is read from front to back. Many for more, so that
// an x which no L2 cache holds is read seldom.
constexpr int64_t kFewPanels = 8;
constexpr int64_t kManyPanels = kTileRows / kSparsePanel;

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

// Adds a block to the sums of its panel; as rows go by, what lies there in `next` is fetched.
template <int kVecs, class Add>
OW_INLINE void sum_block(const SparseGemmArgs& a, const float* x, int64_t block, int64_t next,
                         float* sums) {
  const SparsePattern& w = a.w;
  const int64_t size = value_size(a.value_type);
  const uint8_t* counts = block_counts(w, block);
  const auto total = [counts] {
    int64_t sum = 0;
    for (int64_t r = 0; r < kSparsePanel; ++r) sum += row_count(counts, r);
    return sum;
  };
  float buffer[kSparsePanel * kBytesK];
  const float* value = decode_block(a, w.offsets[block], total, buffer);
  const uint8_t* column = counts + kCountBytes;
  const char* next_values = static_cast<const char*>(a.values) + w.offsets[next] * size;
  const uint8_t* next_index = block_counts(w, next);
  __builtin_prefetch(next_index);
  for (int64_t r = 0; r < kSparsePanel; ++r, sums += kVecs * kLanes) {
    const int64_t count = row_count(counts, r);
    __builtin_prefetch(next_values);
    __builtin_prefetch(next_values + 64);
    __builtin_prefetch(next_index + kCountBytes);
    Add::template add_row<kVecs>(value, column, count, x, sums);
    value += count;
    column += count;
    next_values += count * size;
    next_index += count;
  }
}

// Sums of panels [first, last), at most kPanels, over all of k; x is one panel of tokens.
template <int kVecs, int64_t kPanels, class Add>
void sum_bytes(const SparseGemmArgs& a, const float* x, int64_t first, int64_t last, float* sums) {
  constexpr int64_t kWidth = kVecs * kLanes;
  const SparsePattern& w = a.w;
  memset(sums, 0, size_t((last - first) * kSparsePanel * kWidth) * sizeof(float));
  for (int64_t b = 0; b < w.k_blocks; ++b, x += kBytesK * kWidth) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t block = panel * w.k_blocks + b;
      // The panel's next block, or its like in the next panels; of many panels, the next one's.
      int64_t next =
          b + 1 < w.k_blocks ? block + 1 : min_of(panel + kPanels, w.panels - 1) * w.k_blocks;
      if (kPanels == kManyPanels && panel + 1 < last) next = block + w.k_blocks;
      __builtin_prefetch(w.offsets + block + kPanels * w.k_blocks);
      sum_block<kVecs, Add>(a, x, block, next, sums + (panel - first) * kSparsePanel * kWidth);
    }
  }
}

template <int64_t kPanels, class Add>
OW_INLINE void run_panels(const SparseGemmArgs& a, int64_t begin, int64_t end, float* tile) {
  for_each_token_panel(a.m, kBytesTokens, [&](int64_t row, int64_t rows, int64_t width) {
    const float* x = a.x + row * k_padded_of(a.w);
    for (int64_t panel = begin; panel < end; panel += kPanels) {
      const int64_t last = min_of(panel + kPanels, end);
      if (width == 16) {
        sum_bytes<16 / kLanes, kPanels, Add>(a, x, panel, last, tile);
      } else {
        sum_bytes<32 / kLanes, kPanels, Add>(a, x, panel, last, tile);
      }
      finish_tile(a, panel * kSparsePanel, min_of(last * kSparsePanel, a.w.n), row, rows, width,
                  tile);
    }
  });
}

template <class Add>
void run_bytes(const SparseGemmArgs& a, int64_t begin, int64_t end, float* tile) {
  if (a.m <= kBytesTokens) return run_panels<kFewPanels, Add>(a, begin, end, tile);
  run_panels<kManyPanels, Add>(a, begin, end, tile);
}

}  // namespace
}  // namespace ow::OW_TARGET
