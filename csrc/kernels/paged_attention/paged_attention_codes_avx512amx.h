// Codes as they are: tile products of bytes, with the scales folded into the other side.
//
//   keys, channel axis    q . k^ = sum_c (q[c] scale[c]) code[c] + sum_c q[c] min[c]
//   values, token axis    sum_t p[t] v^[t] = sum_t (p[t] scale[t]) code[t] + sum_t p[t] min[t]
//
// What is in brackets is rounded to three base-256 digits on a power-of-two scale of its row, as in
// kernels/quantize: half a step is 1.004 * 2^-23 of the row's largest, what fp32 itself would lose.
// Sums of digits and codes are exact in int32 (|digit| * code <= 128 * 255, times up to 256). Tile
// row 3 r + i is digit i of row r, so 5 rows are one tile, and a group of four heads leaves it a
// quarter empty.
#pragma once

#include "kernels/paged_attention/paged_attention_body.h"
#include "simd/codes_avx512.h"
#include "simd/tiles.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kDigits = 3;
// Bytes of the depth of a product.
constexpr int64_t kStep = 64;
constexpr int64_t kMaxDepth = 256;
static_assert(kMaxDepth >= kMaxPagedD && kMaxDepth >= kChunkTokens);

// Rows of digits as tiles, largest digit first, and what belongs to a row.
struct DigitRows {
  alignas(64) uint8_t digits[kDigits * kMaxRows][kMaxDepth];
  float scale[kMaxRows];
  float bias[kMaxRows];

  const void* tile(int64_t t, int64_t depth) const { return digits[t * kTileRows] + depth; }
};

// x[i] = a[i] * scales[i] in digits, zero up to a multiple of kStep; bias is sum_i a[i] * mins[i].
OW_INLINE void split_row(const float* a, const float* scales, const float* mins, int64_t n,
                         int64_t row, DigitRows* out) {
  alignas(64) float x[kMaxDepth];
  const int64_t padded = round_up(n, kStep);
  VecI largest = set1(int32_t{0});
  VecF bias = set1(0.0f);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const VecF factor = n > i ? load_n(a + i, n - i) : set1(0.0f);
    const VecF product = n > i ? mul(factor, load_n(scales + i, n - i)) : factor;
    if (n > i) bias = fma(factor, load_n(mins + i, n - i), bias);
    largest = max_(largest, abs_bits(product));
    store(x + i, product);
  }
  const uint32_t most = uint32_t(max_of_lanes(largest));
  const int32_t exponent = int32_t(most >> 23) - 127;
  // 1.f * 2^22 is (2^23 + mantissa) / 2 and must not pass 8355711 = 127 * (65536 + 256 + 1).
  const int32_t shift = (most & 0x7fffff) > 2 * 8355711u - 0x800000u ? 21 : 22;
  out->bias[row] = sum(bias);
  VecF inverse = set1(0.0f);
  if (most >= 0x7f800000) {
    out->scale[row] = bits_to_float(0x7fc00000);
  } else if (exponent < -100) {
    out->scale[row] = 0.0f;
  } else {
    out->scale[row] = bits_to_float(uint32_t(exponent - shift + 127) << 23);
    inverse = set1(bits_to_float(uint32_t(shift - exponent + 127) << 23));
  }
  // Bytes of v + 0x808080, less 0x80 each, are the balanced digits of v.
  const __m512i balance = _mm512_set1_epi32(0x808080);
  for (int64_t i = 0; i < padded; i += kStep) {
    __m512i v[4];
    for (int j = 0; j < 4; ++j) {
      const VecF product = load(x + i + j * kLanes);
      // A NaN times zero is NaN, which to_int would turn into INT_MIN.
      v[j] = out->scale[row] > 0.0f ? to_int(mul(product, inverse)).v : _mm512_setzero_si512();
      v[j] = _mm512_xor_si512(_mm512_add_epi32(v[j], balance), balance);
    }
    for (int d = 0; d < kDigits; ++d) {
      uint8_t* to = out->digits[kDigits * row + d] + i;
      for (int j = 0; j < 4; ++j) {
        const __m512i digit = _mm512_srli_epi32(v[j], 8 * (kDigits - 1 - d));
        _mm_store_si128(reinterpret_cast<__m128i*>(to) + j, _mm512_cvtepi32_epi8(digit));
      }
    }
  }
}

// 16 columns of unpacked codes, [steps][16 lines][64], of each half of a panel.
struct CodeLines {
  alignas(64) uint8_t at[2][kMaxDepth / kStep][kTileRows][kStep];

  // Units of 16 k from `half` on, which become units [to, to + count). `fetch` is called once for
  // each.
  template <int kBits, class Fetch>
  void unpack(const uint8_t* panel, int64_t half_bytes, int64_t to, int64_t count,
              const Fetch& fetch) {
    for (int64_t unit = 0; unit < count; ++unit) {
      fetch();
      const int64_t place = to + unit;
#pragma GCC unroll 2
      for (int64_t half = 0; half < 2; ++half) {
        __m512i codes[4];
        unpack_unit<kBits>(panel + half * half_bytes, unit, codes);
        uint8_t(*lines)[kStep] = at[half][place / 4] + place % 4 * 4;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) _mm512_store_si512(lines[j], codes[j]);
      }
    }
  }
};

// sums[tile row][half] of all digit rows.
struct Sums {
  alignas(64) int32_t at[kDigits * kMaxRows][2][kTileRows];

  // scale[r] * sum + bias[r]
  VecF total(const DigitRows& x, int64_t r, int64_t half) const {
    const auto digit = [&](int64_t d) {
      return to_float(VecI{_mm512_load_si512(at[kDigits * r + d][half])});
    };
    VecF sum = fma(digit(1), set1(256.0f), digit(2));
    sum = fma(digit(0), set1(65536.0f), sum);
    return fma(sum, set1(x.scale[r]), set1(x.bias[r]));
  }
};

// Products of up to two tiles of rows and both halves: they need not wait for each other.
OW_INLINE void multiply(const DigitRows& x, const CodeLines& lines, int64_t rows, int64_t steps,
                        Sums* sums) {
  const int64_t tiles = div_up(kDigits * rows, kTileRows);
  for (int64_t t = 0; t < tiles; t += 2) {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    const bool second = t + 1 < tiles;
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
    int32_t* to = sums->at[t * kTileRows][0];
    store_tile<0>(to, 128), store_tile<1>(to + kTileRows, 128);
    if (!second) continue;
    to = sums->at[(t + 1) * kTileRows][0];
    store_tile<2>(to, 128), store_tile<3>(to + kTileRows, 128);
  }
}

// Both sides of a chunk whose tokens are all in pages.
class CodeSides {
 public:
  static bool reads_keys(const KVSide& side) {
    return !is_dense(side) && side.axis == KVAxis::channel && is_plain(side);
  }
  static bool reads_values(const KVSide& side) {
    return !is_dense(side) && side.axis == KVAxis::token && is_plain(side);
  }

  template <int kBits>
  void score(Rows* rows, const Chunk& chunk, PagesAhead values) {
    const PagedAttentionArgs& a = rows->a;
    const KVSide& side = a.kv.keys;
    const int64_t units = div_up(side.d, kv_block_k(kBits)) * kv_block_k(kBits) / 16;
    for (int64_t i = 0; i < chunk.panels; ++i) {
      const Panel& p = chunk.panel[i];
      if (i == 0 || p.in_page % side.group_size == 0) {
        const Grid grid(a, side, p);
        for (int64_t r = 0; r < rows->count; ++r) {
          split_row(rows->q[r], grid.scales, grid.mins, side.d, r, &x_);
        }
      }
      lines_.unpack<kBits>(key_panel(a, p), kv_block_bytes(kBits) / 2, 0, units,
                           [&] { values.fetch(kBits + 1); });
      multiply(x_, lines_, rows->count, div_up(side.d, kStep), &sums_);
      for (int64_t r = 0; r < rows->count; ++r) {
        for (int64_t half = 0; half < 2; ++half) {
          store(rows->scores[r] + i * kPanelTokens + half * kLanes,
                mul(sums_.total(x_, r, half), set1(a.scale)));
        }
      }
    }
  }

  template <int kBits>
  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead keys) {
    const PagedAttentionArgs& a = rows->a;
    const KVSide& side = a.kv.values;
    alignas(64) float scales[kChunkTokens], mins[kChunkTokens];
    for (int64_t group = 0; group < side.d; group += side.group_size) {
      for (int64_t i = 0; i < chunk.panels; ++i) {
        const int64_t from = scale_at(a, side, chunk.panel[i], group);
        read_floats(side.scales, a.kv.type, from, kPanelTokens, scales + i * kPanelTokens);
        read_floats(side.mins, a.kv.type, from, kPanelTokens, mins + i * kPanelTokens);
      }
      for (int64_t r = 0; r < rows->count; ++r) {
        split_row(rows->scores[r], scales, mins, chunk.tokens, r, &x_);
      }
      const int64_t end = min_of(group + side.group_size, side.d);
      for (int64_t c = group; c < end; c += kKVPanel) {
        for (int64_t i = 0; i < chunk.panels; ++i) {
          lines_.unpack<kBits>(value_panel(a, chunk.panel[i], c), kv_block_bytes(kBits) / 2, 2 * i,
                               2, [&] { keys.fetch(kBits + 1); });
        }
        multiply(x_, lines_, rows->count, div_up(chunk.tokens, kStep), &sums_);
        for (int64_t r = 0; r < rows->count; ++r) {
          float* out = states + r * state_size(a) + c;
          for (int64_t half = 0; half < 2 && c + half * kLanes < end; ++half) {
            const int64_t lanes = end - c - half * kLanes;
            float* to = out + half * kLanes;
            store_n(to, add(load_n(to, lanes), sums_.total(x_, r, half)), lanes);
          }
        }
      }
    }
  }

 private:
  static bool is_plain(const KVSide& side) { return side.table == nullptr && side.outliers == 0; }

  DigitRows x_{};
  CodeLines lines_{};
  Sums sums_;
};

}  // namespace
}  // namespace ow::OW_TARGET
