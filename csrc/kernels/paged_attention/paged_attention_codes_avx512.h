// Codes as they are: integer products, with the scales folded into the other side.
//
//   keys, channel axis    q . k^ = sum_c (q[c] scale[c]) code[c] + sum_c q[c] min[c]
//   values, token axis    sum_t p[t] v^[t] = sum_t (p[t] scale[t]) code[t] + sum_t p[t] min[t]
//
// What is in brackets, x, is rounded to base-256 digits on a scale of its row, as in
// kernels/quantize. Three digits where the type is fp32 or fp16: half a step is 1.004 * 2^-24 of
// the row's largest x, what fp32 itself would lose. For bf16, two: over codes of 8 and 3 bits half
// a step is 1.004 * 2^-16 of the largest, so that what 128 of them may add up to is what rounding
// the largest to bf16 has lost; over codes of 4 and 2 bits two digits of which codes share one
// (paged_attention_two_digits_avx512.h), 1.15 * 2^-12 and 1.69 * 2^-10. Half of that remains, as
// digits meet a code's distance from the code in the middle, and the min, moved there, takes x as
// it is.
//
// Sums of digits and codes are exact in int32: |digit| * code <= 128 * 255, times up to 256; and so
// are those of two digits joined: 32639 * 255 * 256 < 2^31.
#pragma once

#include "kernels/paged_attention/paged_attention_digits_avx512.h"
#include "simd/codes_avx512.h"

namespace ow::OW_TARGET {
namespace {

template <int kN>
struct Number {
  static constexpr int kValue = kN;
  constexpr operator int64_t() const { return kN; }
};

// Halves of a panel whose sums fit in registers beside the codes of a unit: 12 or 16 for four rows,
// and four for each half.
template <int kDigits, int kCount>
constexpr int kHalvesAtOnce = kDigits * kCount <= 8 ? 2 : 1;

// sums[half][digit row] += digits times the codes of one unit. The dword of a row that meets the
// codes is the memory operand of a product, or of its load for two.
template <int kBits, int kDigits, int kHalves, int kRows>
OW_INLINE void add_unit(const uint8_t* codes, int64_t unit, const uint8_t* digits,
                        const uint8_t* shared, __m512i (&sums)[kHalves][kRows]) {
  constexpr int kShared = kSharing<kBits, kDigits>;
  const int64_t half_bytes = block_bytes(kBits) / 2;
  const auto add_products = [&](int first, const uint8_t* dwords,
                                const __m512i(&operand)[kHalves]) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int r = first; r < kRows; r += kShared == 1 ? 1 : 2) {
      int32_t four;
      memcpy(&four, dwords + r * kMaxDepth, 4);
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        sums[h][r] = _mm512_dpbusd_epi32(sums[h][r], operand[h], _mm512_set1_epi32(four));
      }
    }
  };
  __m512i fours[4][kHalves];
#pragma GCC unroll 2
  for (int h = 0; h < kHalves; ++h) {
    __m512i half[4];
    unpack_unit<kBits>(codes + h * half_bytes, unit, half);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) fours[j][h] = half[j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    add_products(0, digits + 4 * j, fours[j]);
    if constexpr (kShared > 1) {
      if (j % kShared != kShared - 1) continue;
      const int line = j / kShared;
      __m512i bytes[kHalves];
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        bytes[h] = load_line(codes + h * half_bytes + unit * block_bytes(kBits) + line * 64);
      }
      add_products(1, shared + 4 * line - kMaxDepth, bytes);
    }
  }
}

// Products of kCount rows from row `first` on and panels of `units` units of 16 k, one after the
// other; put(half, row, total) takes the sums of 16 columns.
template <int kBits, int kDigits, int kCount, class Units, class Fetch, class Put>
OW_INLINE void multiply_panels(const DigitRows<kDigits>& x, int64_t first,
                               const uint8_t* const* panels, int64_t count, int64_t offset,
                               Units units, const Fetch& fetch, const Put& put) {
  constexpr int kHalves = kHalvesAtOnce<kDigits, kCount>;
  constexpr int kRows = kDigits * kCount;
  const int64_t half_bytes = block_bytes(kBits) / 2;
#pragma GCC unroll 1
  for (int half = 0; half < 2; half += kHalves) {
    __m512i sums[kHalves][kRows];
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) sums[h][i] = _mm512_setzero_si512();
    }
    const uint8_t* digits = x.digits[kDigits * first];
    const uint8_t* shared = digits + kMaxDepth;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* codes = panels[i] + offset + half * half_bytes;
      for (int64_t unit = 0; unit < units; ++unit) {
        fetch(half);
        add_unit<kBits, kDigits>(codes, unit, digits, shared, sums);
        digits += 16;
        shared += 16 / kSharing<kBits, kDigits>;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        put(half + h, r, total_of(x, first + r, sums[h] + kDigits * r));
      }
    }
  }
}

// Formats whose codes products take.
OW_INLINE bool is_plain(const KVSide& side) {
  return side.bits <= 8 && side.table == nullptr && side.outliers == 0;
}
OW_INLINE bool has_key_products(const KVSide& side) {
  return side.axis == KVAxis::channel && is_plain(side);
}
OW_INLINE bool has_value_products(const KVSide& side) {
  return side.axis == KVAxis::token && is_plain(side);
}

// Calls body(Number<digits of x>).
template <class Body>
OW_INLINE void with_digits(FloatType type, const Body& body) {
  if (type == FloatType::bf16) return body(Number<2>{});
  body(Number<3>{});
}
// Calls body(Number<bits of a code>).
template <class Body>
OW_INLINE void with_bits(int32_t bits, const Body& body) {
  switch (bits) {
    case 2: return body(Number<2>{});
    case 3: return body(Number<3>{});
    case 4: return body(Number<4>{});
    case 8: return body(Number<8>{});
  }
}

OW_INLINE int64_t key_units(const KVSide& side) {
  return round_up(side.d, block_k(side.bits)) / 16;
}

// Keys and values of a chunk whose tokens are all in pages, by products in vector registers.
template <int kDigits>
class CodeRows {
 public:
  template <int kBits>
  void score(Rows* rows, const Chunk& chunk, PagesAhead* values) {
    const PagedAttentionArgs& a = rows->a;
    const int64_t units = key_units(a.kv.keys);
    for (int64_t i = 0; i < chunk.panels; ++i) {
      split_queries<kSharing<kBits, kDigits>>(*rows, chunk, i, &x_);
      const uint8_t* panel = key_panel(a, chunk.panel[i]);
      for_each_row_block(rows->count, [&](int64_t first, auto count) {
        constexpr int kCount = decltype(count)::kRows;
        float(*scores)[kChunkTokens] = rows->scores + first;
        multiply_panels<kBits, kDigits, kCount>(
            x_, first, &panel, 1, 0, units, ahead<kBits, kCount>(first, values),
            [&](int half, int r, VecF total) {
              store(scores[r] + i * kPanelTokens + half * kLanes, total);
            });
      });
    }
  }

  template <int kBits>
  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead* keys) {
    const PagedAttentionArgs& a = rows->a;
    const uint8_t* panels[kChunkPanels];
    for (int64_t i = 0; i < chunk.panels; ++i) panels[i] = value_panel(a, chunk.panel[i], 0);
    const int64_t panel = panel_bytes(kBits, a.kv.page_size);
    for (int64_t c = 0; c < a.kv.values.d; c += kKVPanel) {
      split_weights<kSharing<kBits, kDigits>>(*rows, chunk, c, &x_);
      for_each_row_block(rows->count, [&](int64_t first, auto count) {
        constexpr int kCount = decltype(count)::kRows;
        float* sums = states + first * state_size(a) + c;
        multiply_panels<kBits, kDigits, kCount>(
            x_, first, panels, chunk.panels, c / kKVPanel * panel, Number<2>{},
            ahead<kBits, kCount>(first, keys), [&](int half, int r, VecF total) {
              const int64_t lanes = a.kv.values.d - c - half * kLanes;
              float* to = sums + r * state_size(a) + half * kLanes;
              if (lanes > 0) store_n(to, add(load_n(to, lanes), total), lanes);
            });
      });
    }
  }

 private:
  // Fetches the other side's lines that go with a unit, once for all rows.
  template <int kBits, int kCount>
  static auto ahead(int64_t first, PagesAhead* pages) {
    return [=](int half) __attribute__((always_inline)) {
      if (first > 0) return;
      pages->fetch(kHalvesAtOnce<kDigits, kCount> == 2 ? kBits : (kBits + half) / 2);
    };
  }

  DigitRows<kDigits> x_{};
};

}  // namespace
}  // namespace ow::OW_TARGET
