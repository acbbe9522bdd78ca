// The Engine of fp32 arithmetic: operands of any type, laid out as floats.
#pragma once

#include "kernels/block_attention/block_attention_body.h"

namespace ow::OW_TARGET {
namespace {

struct FloatEngine {
  using Element = float;
  static constexpr int64_t kPair = 1;
  static constexpr int64_t kDepth = 1;
  static constexpr int64_t kTileUnits = 4;  // 32 KiB of scores
  // Vectors of queries and rows of the left side whose sums are in registers.
  static constexpr int kVectors = kLanes == 16 ? 4 : 2;
  static constexpr int kRows = 6;

  // kLanes rows from row `first` on, dimensions c .. c + kLanes - 1; zeros outside.
  OW_INLINE void load_square(const void* const* rows, int64_t count, FloatType type, int64_t c,
                             int64_t d, VecF (&square)[kLanes]) {
    for (int64_t r = 0; r < kLanes; ++r) {
      square[r] = set1(0.0f);
      if (r >= count || c >= d) continue;
      by_type(type, rows[r], [&](const auto* row) { square[r] = load_n(row + c, d - c); });
    }
  }

  static void pack_queries(const void* const* rows, int64_t count, FloatType type, int64_t d,
                           int64_t, bool negative, float* out) {
    for (int64_t c = 0; c < d; c += kLanes) {
      VecF square[kLanes];
      load_square(rows, count, type, c, d, square);
      transpose(square);
      for (int64_t r = 0; r < min_of(kLanes, d - c); ++r) {
        store(out + (c + r) * kQueryTile, negative ? sub(set1(0.0f), square[r]) : square[r]);
      }
    }
  }

  static void copy_row(const void* from, FloatType type, int64_t d, int64_t, float* to) {
    by_type(type, from, [&](const auto* row) {
      for (int64_t c = 0; c < d; c += kLanes) store_n(to + c, load_n(row + c, d - c), d - c);
    });
  }

  static void pack_panels(const void* const* rows, int64_t count, FloatType type, int64_t d,
                          float* out) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < d; c += kQueryTile) {
        const int64_t width = min_of(d - c, kQueryTile);
        const uint8_t* from = static_cast<const uint8_t*>(rows[i]) + c * float_size(type);
        copy_row(from, type, width, width, out + (c + i) * kQueryTile);
      }
    }
  }

  static void transpose_values(const void* const* rows, int64_t count, FloatType type, int64_t dv,
                               int64_t padded, float* out) {
    for (int64_t j = 0; j < kUnitKeys; j += kLanes) {
      for (int64_t c = 0; c < padded; c += kLanes) {
        VecF square[kLanes];
        load_square(rows + j, count - j, type, c, dv, square);
        transpose(square);
        for (int64_t r = 0; r < kLanes; ++r) store(out + (c + r) * kUnitKeys + j, square[r]);
      }
    }
  }

  template <class T>
  static void write_rows(const float* o, VecF inverse, int64_t count, int64_t dv,
                         void* const* out) {
    for (int64_t c = 0; c < dv; c += kLanes) {
      VecF rows[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) rows[r] = mul(load(o + (c + r) * kQueryTile), inverse);
      transpose(rows);
      for (int64_t r = 0; r < min_of(kLanes, count); ++r) {
        store_n(static_cast<T*>(out[r]) + c, rows[r], dv - c);
      }
    }
  }
  static void write_outputs(const float* o, VecF inverse, int64_t count, FloatType type, int64_t dv,
                            void* const* out) {
    by_type(type, out[0], [&]<class T>(T*) { write_rows<T>(o, inverse, count, dv, out); });
  }

  OW_INLINE VecF exp2(VecF x) { return exp2_(x); }

  OW_INLINE void store_weights(float* weights, int64_t j, int64_t i, VecF even, VecF odd) {
    store(weights + j * kQueryTile + i, even);
    store(weights + (j + 1) * kQueryTile + i, odd);
  }
  OW_INLINE void store_rows(float* rows, int64_t j, int64_t i, VecF even, VecF odd) {
    store_weights(rows, j, i, even, odd);
  }
  OW_INLINE void load_weights(const float* weights, int64_t j, int64_t i, VecF* even, VecF* odd) {
    *even = load(weights + j * kQueryTile + i);
    *odd = load(weights + (j + 1) * kQueryTile + i);
  }

  using Column = VecF;
  OW_INLINE VecF load_column(const float* p) { return load(p); }
  OW_INLINE VecF broadcast(const float* p) { return set1(*p); }
  OW_INLINE void accumulate(VecF& sum, VecF left, VecF column) { sum = fma(left, column, sum); }

  static void multiply(const Product<float>& p) { ow::OW_TARGET::multiply<FloatEngine>(p); }
};

}  // namespace
}  // namespace ow::OW_TARGET
