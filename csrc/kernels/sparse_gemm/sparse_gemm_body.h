// The kernels over panels of tokens in terms of simd/vec.h; each sparse_gemm_<tier>.cpp with
// vectors compiles them once.
//
// A stored value costs a broadcast and, for each vector of tokens, a load and a multiply-add, so
// the load ports are what binds: of L1-resident panels of 128 tokens, 9 loads for 8 multiply-adds
// on AVX-512. Hence wide panels, and steps of k whose panel rows fill 32 KiB, a small L1 cache.
// (Two rows that share the loads of the columns both store measured the same: fewer loads, more
// instructions and more loops whose ends are mispredicted. Those ends are what is left: of the rate
// the loads allow, half stored reaches three quarters and a tenth stored, 6 values a row of a
// block, not quite half.)
#pragma once

#include "kernels/sparse_gemm/sparse_gemm.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kStepBytes = 32 * 1024;
constexpr int64_t kWidest = 8 * kLanes < kMaxTokens ? 8 * kLanes : kMaxTokens;

// Columns [begin, end) of kLanes rows of x from row `first` on, transposed to out [.., width].
template <class T>
OW_INLINE void transpose_rows(const SparseXArgs& a, int64_t first, int64_t begin, int64_t end,
                              int64_t width, float* out) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t rows = min_of(kLanes, a.m - first);
  for (int64_t k = begin; k < end; k += kLanes) {
    VecF square[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      square[i] = set1(0.0f);
      if (i < rows && k < a.k) square[i] = load_n(x + (first + i) * a.k + k, a.k - k);
    }
    transpose(square);
#pragma GCC unroll 16
    for (int64_t j = 0; j < kLanes; ++j) store(out + (k + j) * width, square[j]);
  }
}

template <class T>
OW_INLINE void prepare_rows(const SparseXArgs& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  for (int64_t k = begin; k < end; k += kLanes) {
    for (int64_t i = 0; i < a.m; ++i) {
      const VecF columns = k < a.k ? load_n(x + i * a.k + k, a.k - k) : set1(0.0f);
      store(a.out + row_place(a.m, i, k), columns);
    }
  }
}

template <class T>
OW_INLINE void prepare_typed(const SparseXArgs& a, int64_t begin, int64_t end) {
  if (a.widest == 0) return prepare_rows<T>(a, begin, end);
  for_each_token_panel(a.m, a.widest, [&](int64_t first, int64_t, int64_t width) {
    float* panel = a.out + first * a.k_padded;
    for (int64_t i = 0; i < width; i += kLanes) {
      transpose_rows<T>(a, first + i, begin, end, width, panel + i);
    }
  });
}

void prepare(const SparseXArgs& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case FloatType::f32: return prepare_typed<float>(a, begin, end);
    case FloatType::bf16: return prepare_typed<bf16>(a, begin, end);
    case FloatType::f16: return prepare_typed<f16>(a, begin, end);
  }
}

// The values of a block as floats: where they lie, or decoded to `buffer`, once for all tokens.
// count() is how many there are.
template <class Count>
OW_INLINE const float* decode_block(const SparseGemmArgs& a, int64_t offset, const Count& count,
                                    float* buffer) {
  if (a.value_type == ValueType::f32) return static_cast<const float*>(a.values) + offset;
  const int64_t n = count();
  if (a.value_type == ValueType::bf16) {
    const bf16* values = static_cast<const bf16*>(a.values) + offset;
    for (int64_t i = 0; i < n; i += kLanes) store_n(buffer + i, load_n(values + i, n - i), n - i);
  } else {
    const int8_t* values = static_cast<const int8_t*>(a.values) + offset;
    for (int64_t i = 0; i < n; ++i) buffer[i] = float(values[i]);
  }
  return buffer;
}

// acc[t] += w * x[j, t] for the first column j of a mask, which it loses.
template <int kVecs>
OW_INLINE void add_column(uint64_t& mask, VecF w, const float* x, VecF* acc) {
  const float* column = x + __builtin_ctzll(mask) * (kVecs * kLanes);
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) acc[v] = fma(w, load(column + v * kLanes), acc[v]);
  mask &= mask - 1;
}

// Adds what a mask chooses: acc[t] += sum_j value_j * x[j, t]. A tier may have a better one, which
// may fetch what lies `ahead` bytes on, too.
struct AddOneByOne {
  static constexpr bool kFetches = false;
  template <int kVecs>
  OW_INLINE void add(uint64_t mask, const float* value, int64_t, const float* x, VecF* acc) {
    for (; mask != 0; ++value) add_column<kVecs>(mask, set1(*value), x, acc);
  }
};

// Adds a row of a block to its sums. Returns the next value.
template <int kVecs, class Add>
OW_INLINE const float* add_row(uint64_t mask, const float* value, int64_t ahead, const float* x,
                               float* sums) {
  VecF acc[kVecs];
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) acc[v] = load(sums + v * kLanes);
  Add::template add<kVecs>(mask, value, ahead, x, acc);
#pragma GCC unroll 16
  for (int v = 0; v < kVecs; ++v) store(sums + v * kLanes, acc[v]);
  return value + __builtin_popcountll(mask);
}

// Blocks of one k_block lie a panel apart, too far for the hardware to follow.
OW_INLINE void prefetch_masks(const SparsePattern& w, int64_t block) {
  const char* masks = reinterpret_cast<const char*>(w.masks + block * kSparsePanel);
  __builtin_prefetch(masks);
  __builtin_prefetch(masks + 64);
}
OW_INLINE void prefetch_values(const SparsePattern& w, const void* values, int64_t size,
                               int64_t block, bool last) {
  const char* at = static_cast<const char*>(values) + w.offsets[block] * size;
  const int64_t next = last ? w.offsets[block] : w.offsets[block + 1];
  for (int64_t byte = 0; byte < (next - w.offsets[block]) * size; byte += 64) {
    __builtin_prefetch(at + byte);
  }
}

template <class T>
OW_INLINE void finish_outputs(const SparseGemmArgs& a, int64_t row, int64_t n, int64_t n_end,
                              VecF value) {
  const int64_t lanes = min_of(kLanes, n_end - n);
  if (a.scales != nullptr) value = mul(value, load_n(a.scales + n, lanes));
  if (a.bias != nullptr) value = add(value, load_n(static_cast<const T*>(a.bias) + n, lanes));
  const int64_t at = row * a.w.n + n;
  if (a.add != nullptr) value = add(value, load_n(static_cast<const T*>(a.add) + at, lanes));
  store_n(static_cast<T*>(a.y) + at, value, lanes);
}

// The outputs of a panel, from n on, for one row.
OW_INLINE void finish_line(const SparseGemmArgs& a, int64_t row, int64_t n, VecF value) {
  switch (a.y_type) {
    case FloatType::f32: return finish_outputs<float>(a, row, n, a.w.n, value);
    case FloatType::bf16: return finish_outputs<bf16>(a, row, n, a.w.n, value);
    case FloatType::f16: return finish_outputs<f16>(a, row, n, a.w.n, value);
  }
}

// Outputs [n_begin, n_end) of `rows` rows of y from `first` on, from tile [.., width].
template <class T>
OW_INLINE void finish_typed(const SparseGemmArgs& a, int64_t n_begin, int64_t n_end, int64_t first,
                            int64_t rows, int64_t width, const float* tile) {
  for (int64_t n = n_begin; n < n_end; n += kLanes) {
    const float* sums = tile + (n - n_begin) * width;
    for (int64_t i = 0; i < rows; i += kLanes) {
      VecF square[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) square[r] = load(sums + r * width + i);
      transpose(square);
      for (int64_t t = 0; t < min_of(kLanes, rows - i); ++t) {
        finish_outputs<T>(a, first + i + t, n, n_end, square[t]);
      }
    }
  }
}

OW_INLINE void finish_tile(const SparseGemmArgs& a, int64_t n_begin, int64_t n_end, int64_t first,
                           int64_t rows, int64_t width, const float* tile) {
  switch (a.y_type) {
    case FloatType::f32: return finish_typed<float>(a, n_begin, n_end, first, rows, width, tile);
    case FloatType::bf16: return finish_typed<bf16>(a, n_begin, n_end, first, rows, width, tile);
    case FloatType::f16: return finish_typed<f16>(a, n_begin, n_end, first, rows, width, tile);
  }
}

// Sums of panels [begin, end) over all of k; x is one panel of tokens, tile [16 (end - begin),
// width].
template <int kVecs, class Add>
void sum_panels(const SparseGemmArgs& a, const float* x, int64_t begin, int64_t end, float* tile) {
  constexpr int64_t kWidth = kVecs * kLanes;
  constexpr int64_t kBlocks = kStepBytes / (kMaskK * kWidth * int64_t(sizeof(float)));
  const SparsePattern& w = a.w;
  const int64_t size = value_size(a.value_type);
  memset(tile, 0, size_t((end - begin) * kSparsePanel * kWidth) * sizeof(float));
  const bool fetches = Add::kFetches && a.value_type == ValueType::f32;  // else it sees a buffer
  float buffer[kSparsePanel * kMaskK];
  for (int64_t step = 0; step < w.k_blocks; step += kBlocks) {
    const int64_t step_end = min_of(step + kBlocks, w.k_blocks);
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t b = step; b < step_end; ++b) {
        const int64_t block = panel * w.k_blocks + b;
        int64_t ahead = 0;
        if (panel + 1 < end) {
          const int64_t next = block + w.k_blocks;
          prefetch_masks(w, next);
          if (fetches) {
            ahead = (w.offsets[next] - w.offsets[block]) * size;
          } else {
            prefetch_values(w, a.values, size, next, b + 1 == w.k_blocks);
          }
        }
        const uint64_t* masks = w.masks + block * kSparsePanel;
        const auto count = [masks] {
          int64_t bits = 0;
          for (int64_t r = 0; r < kSparsePanel; ++r) bits += __builtin_popcountll(masks[r]);
          return bits;
        };
        const float* value = decode_block(a, w.offsets[block], count, buffer);
        const float* columns = x + b * kMaskK * kWidth;
        float* sums = tile + (panel - begin) * kSparsePanel * kWidth;
        for (int64_t r = 0; r < kSparsePanel; ++r) {
          value = add_row<kVecs, Add>(masks[r], value, ahead, columns, sums + r * kWidth);
        }
      }
    }
  }
}

template <int64_t kWidth, class Add>
OW_INLINE void sum_width(const SparseGemmArgs& a, const float* x, int64_t begin, int64_t end,
                         float* tile) {
  if constexpr (kWidth <= kWidest) sum_panels<int(kWidth / kLanes), Add>(a, x, begin, end, tile);
}

template <class Add>
[[maybe_unused]] void run_tokens(const SparseGemmArgs& a, int64_t begin, int64_t end, float* tile) {
  constexpr int64_t kTilePanels = kTileRows / kSparsePanel;
  for_each_token_panel(a.m, kWidest, [&](int64_t first, int64_t rows, int64_t width) {
    const float* x = a.x + first * k_padded_of(a.w);
    for (int64_t panel = begin; panel < end; panel += kTilePanels) {
      const int64_t last = min_of(panel + kTilePanels, end);
      switch (width) {
        case 16: sum_width<16, Add>(a, x, panel, last, tile); break;
        case 32: sum_width<32, Add>(a, x, panel, last, tile); break;
        case 64: sum_width<64, Add>(a, x, panel, last, tile); break;
        default: sum_width<128, Add>(a, x, panel, last, tile); break;
      }
      const int64_t n = panel * kSparsePanel;
      const int64_t n_end = min_of(last * kSparsePanel, a.w.n);
      finish_tile(a, n, n_end, first, rows, width, tile);
    }
  });
}

OW_INLINE float dot_tokens(const float* g, const float* x, int64_t width) {
  VecF even = set1(0.0f);
  VecF odd = set1(0.0f);
  for (int64_t t = 0; t < width; t += 2 * kLanes) {
    even = fma(load(g + t), load(x + t), even);
    if (t + kLanes < width) odd = fma(load(g + t + kLanes), load(x + t + kLanes), odd);
  }
  return sum(add(even, odd));
}

[[maybe_unused]] void run_sampled(const SampledGemmArgs& a, int64_t begin, int64_t end) {
  const SparsePattern& w = a.w;
  for_each_token_panel(a.m, kWidest, [&](int64_t first, int64_t, int64_t width) {
    const float* x = a.x + first * k_padded_of(w);
    const float* g = a.g + first * w.panels * kSparsePanel;
    for (int64_t b = 0; b < w.k_blocks; ++b) {
      const float* columns = x + b * w.block_k * width;
      for (int64_t panel = begin; panel < end; ++panel) {
        const float* rows = g + panel * kSparsePanel * width;
        for_each_stored(w, panel * w.k_blocks + b, [&](int64_t value, int64_t r, int64_t column) {
          a.grad[value] += dot_tokens(rows + r * width, columns + column * width, width);
        });
      }
    }
  });
}

}  // namespace
}  // namespace ow::OW_TARGET
