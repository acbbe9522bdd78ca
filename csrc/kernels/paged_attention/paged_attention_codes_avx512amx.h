// Products of codes for many rows: tile row kDigits * r + i is digit i of row r, and codes are
// unpacked to the cache, from where each tile of rows takes them.
#pragma once

#include "kernels/paged_attention/paged_attention_codes_avx512.h"
#include "simd/tiles.h"

namespace ow::OW_TARGET {
namespace {

// 16 columns of unpacked codes, [steps][16 lines][64], of each half of a panel.
struct CodeLines {
  alignas(64) uint8_t at[2][kMaxDepth / kStep][kTileRows][kStep];

  // Units of 16 k from `panel` on, which become units [to, to + count).
  template <int kBits>
  void unpack(const uint8_t* panel, int64_t to, int64_t count, PagesAhead* ahead) {
    constexpr int64_t half_bytes = 32 * (kBits == 3 ? 6 : kBits);
    uint8_t* lines = at[0][0][0] + to * (4 * kStep);
    for (int64_t unit = 0; unit < count; ++unit, lines += 4 * kStep) {
      ahead->fetch(kBits + 1);
#pragma GCC unroll 2
      for (int64_t half = 0; half < 2; ++half) {
        __m512i codes[4];
        unpack_unit<kBits>(panel + half * half_bytes, unit, codes);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          _mm512_store_si512(lines + half * int64_t(sizeof(at[0])) + j * kStep, codes[j]);
        }
      }
    }
  }
};

// sums[tile row][half] of all digit rows, and bytes from row to row.
constexpr int64_t kSumBytes = 2 * 64;
template <int kDigits>
struct Sums {
  alignas(64) int32_t at[kDigits * kMaxRows][2][kTileRows];

  VecF total(const DigitRows<kDigits>& x, int64_t r, int64_t half) const {
    __m512i digits[kDigits];
    for (int d = 0; d < kDigits; ++d) digits[d] = _mm512_load_si512(at[kDigits * r + d][half]);
    return total_of(x, r, digits);
  }
};

// A product waits 52 cycles for the one before it on the same sums, so four sums are kept going: of
// both halves of two panels for one tile of rows, or of one panel for two.
template <int kDigits>
OW_INLINE void multiply_two_panels(const DigitRows<kDigits>& x, const CodeLines* lines,
                                   int64_t steps, Sums<kDigits>* sums) {
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int64_t s = 0; s < steps; ++s) {
    load_tile<4>(x.tile(0, s * kStep), kMaxDepth);
    load_tile<5>(lines[0].at[0][s], kStep);
    multiply_codes<0, 4, 5>();
    load_tile<6>(lines[0].at[1][s], kStep);
    multiply_codes<1, 4, 6>();
    load_tile<7>(lines[1].at[0][s], kStep);
    multiply_codes<2, 4, 7>();
    load_tile<5>(lines[1].at[1][s], kStep);
    multiply_codes<3, 4, 5>();
  }
  store_tile<0>(sums[0].at[0][0], kSumBytes), store_tile<1>(sums[0].at[0][1], kSumBytes);
  store_tile<2>(sums[1].at[0][0], kSumBytes), store_tile<3>(sums[1].at[0][1], kSumBytes);
}

template <int kDigits>
OW_INLINE void multiply_two_tiles(const DigitRows<kDigits>& x, const CodeLines& lines, int64_t t,
                                  bool second, int64_t steps, Sums<kDigits>* sums) {
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (int64_t s = 0; s < steps; ++s) {
    load_tile<4>(x.tile(t, s * kStep), kMaxDepth);
    load_tile<6>(lines.at[0][s], kStep);
    multiply_codes<0, 4, 6>();
    load_tile<7>(lines.at[1][s], kStep);
    multiply_codes<1, 4, 7>();
    if (!second) continue;
    load_tile<5>(x.tile(t + 1, s * kStep), kMaxDepth);
    multiply_codes<2, 5, 6>();
    multiply_codes<3, 5, 7>();
  }
  auto* to = sums->at + t * kTileRows;
  store_tile<0>(to[0][0], kSumBytes), store_tile<1>(to[0][1], kSumBytes);
  if (!second) return;
  to += kTileRows;
  store_tile<2>(to[0][0], kSumBytes), store_tile<3>(to[0][1], kSumBytes);
}

// Products of all rows and `panels`, one or two, panels.
template <int kDigits>
OW_INLINE void multiply(const DigitRows<kDigits>& x, const CodeLines* lines, int64_t panels,
                        int64_t rows, int64_t steps, Sums<kDigits>* sums) {
  const int64_t tiles = div_up(kDigits * rows, kTileRows);
  if (tiles == 1 && panels == 2) return multiply_two_panels(x, lines, steps, sums);
  for (int64_t i = 0; i < panels; ++i) {
    for (int64_t t = 0; t < tiles; t += 2) {
      multiply_two_tiles(x, lines[i], t, t + 1 < tiles, steps, sums + i);
    }
  }
}

// The same sides for many rows, by tile products.
template <int kDigits>
class CodeTiles {
 public:
  template <int kBits>
  void score(Rows* rows, const Chunk& chunk, PagesAhead* values) {
    const PagedAttentionArgs& a = rows->a;
    const KVSide& side = a.kv.keys;
    for (int64_t i = 0; i < chunk.panels;) {
      split_queries<1>(*rows, chunk, i, &x_);
      // The next panel, if it has the same scales.
      const int64_t next = chunk.panel[i].in_page + kPanelTokens;
      const bool two = i + 1 < chunk.panels && next % side.group_size != 0;
      for (int64_t j = 0; j <= two; ++j) {
        lines_[j].unpack<kBits>(key_panel(a, chunk.panel[i + j]), 0, key_units(side), values);
      }
      multiply(x_, lines_, 1 + two, rows->count, div_up(side.d, kStep), sums_);
      for (int64_t j = 0; j <= two; ++j, ++i) put_scores(rows, i, sums_[j]);
    }
  }

  template <int kBits>
  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead* keys) {
    const PagedAttentionArgs& a = rows->a;
    const KVSide& side = a.kv.values;
    for (int64_t c = 0; c < side.d;) {
      split_weights<1>(*rows, chunk, c, &x_);
      const int64_t next = c + kKVPanel;
      const bool two = next < side.d && next % side.group_size != 0;
      for (int64_t j = 0; j <= two; ++j) {
        for (int64_t i = 0; i < chunk.panels; ++i) {
          lines_[j].unpack<kBits>(value_panel(a, chunk.panel[i], c + j * kKVPanel), 2 * i, 2, keys);
        }
      }
      multiply(x_, lines_, 1 + two, rows->count, div_up(chunk.tokens, kStep), sums_);
      for (int64_t j = 0; j <= two; ++j, c += kKVPanel) add_sums(rows, c, sums_[j], states);
    }
  }

 private:
  void put_scores(Rows* rows, int64_t i, const Sums<kDigits>& sums) const {
    for (int64_t r = 0; r < rows->count; ++r) {
      for (int64_t half = 0; half < 2; ++half) {
        store(rows->scores[r] + i * kPanelTokens + half * kLanes, sums.total(x_, r, half));
      }
    }
  }

  void add_sums(const Rows* rows, int64_t c, const Sums<kDigits>& sums, float* states) const {
    const int64_t channels = rows->a.kv.values.d - c;
    for (int64_t r = 0; r < rows->count; ++r) {
      float* out = states + r * state_size(rows->a) + c;
      for (int64_t half = 0; half < 2 && half * kLanes < channels; ++half) {
        float* to = out + half * kLanes;
        const int64_t lanes = channels - half * kLanes;
        store_n(to, add(load_n(to, lanes), sums.total(x_, r, half)), lanes);
      }
    }
  }

  DigitRows<kDigits> x_{};
  CodeLines lines_[2]{};
  Sums<kDigits> sums_[2];
};

}  // namespace
}  // namespace ow::OW_TARGET
