// Codes as they are: integer products, with the scales folded into the other side.
//
//   keys, channel axis    q . k^ = sum_c (q[c] scale[c]) code[c] + sum_c q[c] min[c]
//   values, token axis    sum_t p[t] v^[t] = sum_t (p[t] scale[t]) code[t] + sum_t p[t] min[t]
//
// What is in brackets is rounded to three base-256 digits on a power-of-two scale of its row, as in
// kernels/quantize: half a step is 1.004 * 2^-23 of the row's largest, what fp32 itself would lose.
// (With two digits an error of 1e-5 of the largest value could be exceeded: half a step of 2^-15,
// times codes up to 255, over 128 channels.) Sums of digits and codes are exact in int32: |digit| *
// code <= 128 * 255, times up to 256.
#pragma once

#include "kernels/paged_attention/paged_attention_body.h"
#include "simd/codes_avx512.h"

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

  const void* tile(int64_t t, int64_t depth) const { return digits[t * 16] + depth; }
};

// Selects byte `first` of each lane of two vectors, and then byte `second`.
OW_INLINE __m512i every_fourth_byte(int first, int second) {
  const __m512i lanes = _mm512_cvtepu8_epi16(_mm256_set_epi8(31, 30, 29, 28, 27, 26, 25, 24, 23, 22,
                                                             21, 20, 19, 18, 17, 16, 15, 14, 13, 12,
                                                             11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  const __m256i bytes = _mm512_cvtepi16_epi8(_mm512_slli_epi16(lanes, 2));
  const __m256i one = _mm256_add_epi8(bytes, _mm256_set1_epi8(char(first)));
  const __m256i two = _mm256_add_epi8(bytes, _mm256_set1_epi8(char(second)));
  return _mm512_inserti64x4(_mm512_castsi256_si512(one), two, 1);
}

// x[i] = a[i] * scales[i] in digits, zero up to a multiple of kStep; bias is sum_i a[i] * mins[i].
OW_INLINE void split_row(const float* a, const float* scales, const float* mins, int64_t n,
                         int64_t row, DigitRows* out) {
  alignas(64) float x[kMaxDepth];
  const int64_t padded = round_up(n, kStep);
  VecI largest = set1(int32_t{0});
  VecF bias = set1(0.0f);
  const auto add_vector = [&](int64_t i, auto load_at) __attribute__((always_inline)) {
    const VecF factor = load_at(a + i);
    const VecF product = mul(factor, load_at(scales + i));
    bias = fma(factor, load_at(mins + i), bias);
    largest = max_(largest, abs_bits(product));
    store(x + i, product);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add_vector(i, [](const float* p) { return load(p); });
  for (; i < padded; i += kLanes) {
    const int64_t lanes = n > i ? n - i : 0;
    add_vector(i, [lanes](const float* p) { return load_n(p, lanes); });
  }
  const uint32_t most = uint32_t(max_of_lanes(largest));
  const int32_t exponent = int32_t(most >> 23) - 127;
  // 1.f * 2^22 is (2^23 + mantissa) / 2 and must not pass 8355711 = 127 * (65536 + 256 + 1).
  const int32_t shift = (most & 0x7fffff) > 2 * 8355711u - 0x800000u ? 21 : 22;
  out->bias[row] = sum(bias);
  float inverse_scale = 0.0f;
  if (most >= 0x7f800000) {
    out->scale[row] = bits_to_float(0x7fc00000);
  } else if (exponent < -100) {
    out->scale[row] = 0.0f;
  } else {
    out->scale[row] = bits_to_float(uint32_t(exponent - shift + 127) << 23);
    inverse_scale = bits_to_float(uint32_t(shift - exponent + 127) << 23);
  }
  // Bytes of v + 0x808080, less 0x80 each, are the balanced digits of v.
  const __m512i balance = _mm512_set1_epi32(0x808080);
  // Of two vectors, byte 2 of each lane and then byte 1; byte 0 and then what is left.
  const __m512i high = every_fourth_byte(2, 1);
  const __m512i low = every_fourth_byte(0, 3);
  const bool zero = inverse_scale == 0.0f;
  for (int64_t i = 0; i < padded; i += kStep) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i whole = to_int(mul(load(x + i + j * kLanes), set1(inverse_scale))).v;
      // A NaN times zero is NaN, which to_int would turn into INT_MIN.
      v[j] = _mm512_maskz_add_epi32(zero ? 0 : 0xffff, whole, balance);
    }
    const __m512i first = _mm512_permutex2var_epi8(v[0], high, v[1]);
    const __m512i second = _mm512_permutex2var_epi8(v[2], high, v[3]);
    const __m512i third = _mm512_permutex2var_epi8(v[0], low, v[1]);
    const __m512i fourth = _mm512_permutex2var_epi8(v[2], low, v[3]);
    const __m512i sign = _mm512_set1_epi8(zero ? 0 : char(0x80));
    const auto put = [&](int64_t d, __m512i bytes) __attribute__((always_inline)) {
      _mm512_store_si512(out->digits[kDigits * row + d] + i, _mm512_xor_si512(bytes, sign));
    };
    put(0, _mm512_shuffle_i64x2(first, second, 0x44));
    put(1, _mm512_shuffle_i64x2(first, second, 0xee));
    put(2, _mm512_shuffle_i64x2(third, fourth, 0x44));
  }
}

// hi * 65536 + mid * 256 + lo, scaled, and the row's bias.
OW_INLINE VecF total_of(const DigitRows& x, int64_t r, __m512i high, __m512i middle, __m512i low) {
  VecF sum = fma(to_float(VecI{middle}), set1(256.0f), to_float(VecI{low}));
  sum = fma(to_float(VecI{high}), set1(65536.0f), sum);
  return fma(sum, set1(x.scale[r]), set1(x.bias[r]));
}

// Sums of 16 columns and kCount rows from row `first` on, in registers: 12 for four rows, and four
// for the codes of a unit. The dword of a row that meets them is the product's own memory operand.
template <int kCount>
class HalfSums {
 public:
  HalfSums(const DigitRows& x, int64_t first) : x_(x), first_(first) {
    for (__m512i& sum : sums_) sum = _mm512_setzero_si512();
  }

  // Adds `units` units of 16 k, of which the first meets depth `depth` of the rows.
  template <int kBits, class Fetch>
  __attribute__((always_inline)) void add(const uint8_t* half, int64_t units, int64_t depth,
                                          const Fetch& fetch) {
    // In variables of their own: the bytes that are read might be the members.
    __m512i sums[kDigits * kCount];
#pragma GCC unroll 12
    for (int i = 0; i < kDigits * kCount; ++i) sums[i] = sums_[i];
    const uint8_t* digits = x_.digits[kDigits * first_] + depth;
    for (int64_t unit = 0; unit < units; ++unit, digits += 16) {
      fetch();
      __m512i codes[4];
      unpack_unit<kBits>(half, unit, codes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 12
        for (int i = 0; i < kDigits * kCount; ++i) {
          int32_t four;
          memcpy(&four, digits + i * kMaxDepth + 4 * j, 4);
          sums[i] = _mm512_dpbusd_epi32(sums[i], codes[j], _mm512_set1_epi32(four));
        }
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kDigits * kCount; ++i) sums_[i] = sums[i];
  }
  VecF total(int64_t r) const {
    const __m512i* sums = sums_ + kDigits * r;
    return total_of(x_, first_ + r, sums[0], sums[1], sums[2]);
  }

 private:
  const DigitRows& x_;
  int64_t first_;
  __m512i sums_[kDigits * kCount];
};

// Scales of the keys of panel i in the queries, once for each group of tokens.
OW_INLINE void split_queries(const Rows& rows, const Chunk& chunk, int64_t i, DigitRows* x) {
  const KVSide& side = rows.a.kv.keys;
  if (i > 0 && chunk.panel[i].in_page % side.group_size != 0) return;
  const Grid grid(rows.a, side, chunk.panel[i]);
  for (int64_t r = 0; r < rows.count; ++r) {
    split_row(rows.q[r], grid.scales, grid.mins, side.d, r, x);
  }
}

// Scales of the values in the weights, once for each group of channels.
OW_INLINE void split_weights(const Rows& rows, const Chunk& chunk, int64_t channel, DigitRows* x) {
  const PagedAttentionArgs& a = rows.a;
  const KVSide& side = a.kv.values;
  if (channel % side.group_size != 0) return;
  alignas(64) float scales[kChunkTokens], mins[kChunkTokens];
  for (int64_t i = 0; i < chunk.panels; ++i) {
    const int64_t from = scale_at(a, side, chunk.panel[i], channel);
    read_floats(side.scales, a.kv.type, from, kPanelTokens, scales + i * kPanelTokens);
    read_floats(side.mins, a.kv.type, from, kPanelTokens, mins + i * kPanelTokens);
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    split_row(rows.scores[r], scales, mins, chunk.tokens, r, x);
  }
}

template <int kN>
struct Bits {
  static constexpr int kValue = kN;
};
// Calls body(Bits<bits>) for the bits of a code.
template <class Body>
OW_INLINE void with_bits(int32_t bits, const Body& body) {
  switch (bits) {
    case 2: return body(Bits<2>{});
    case 3: return body(Bits<3>{});
    case 4: return body(Bits<4>{});
    case 8: return body(Bits<8>{});
  }
}

OW_INLINE int64_t key_units(const KVSide& side) {
  return round_up(side.d, kv_block_k(side.bits)) / 16;
}

// Keys and values of a chunk whose tokens are all in pages, by products in vector registers.
class CodeSides {
 public:
  static bool reads_keys(const KVSide& side) {
    return side.bits <= 8 && side.axis == KVAxis::channel && is_plain(side);
  }
  static bool reads_values(const KVSide& side) {
    return side.bits <= 8 && side.axis == KVAxis::token && is_plain(side);
  }

  template <int kBits>
  void score(Rows* rows, const Chunk& chunk, PagesAhead* values) {
    const PagedAttentionArgs& a = rows->a;
    const int64_t units = key_units(a.kv.keys);
    for (int64_t i = 0; i < chunk.panels; ++i) {
      split_queries(*rows, chunk, i, &x_);
      const uint8_t* panel = key_panel(a, chunk.panel[i]);
      for (int64_t half = 0; half < 2; ++half) {
        const uint8_t* from = panel + half * (kv_block_bytes(kBits) / 2);
        for_each_row_block(rows->count, [&](int64_t first, auto count) {
          constexpr int kCount = decltype(count)::kRows;
          HalfSums<kCount> sums(x_, first);
          const int64_t lines = first == 0 ? kBits / 2 + half : 0;
          sums.template add<kBits>(from, units, 0, [&] { values->fetch(lines); });
          for (int r = 0; r < kCount; ++r) {
            store(rows->scores[first + r] + i * kPanelTokens + half * kLanes,
                  mul(sums.total(r), set1(a.scale)));
          }
        });
      }
    }
  }

  template <int kBits>
  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead* keys) {
    const PagedAttentionArgs& a = rows->a;
    for (int64_t c = 0; c < a.kv.values.d; c += kLanes) {
      split_weights(*rows, chunk, c, &x_);
      const int64_t half = c % kKVPanel / kLanes;
      for_each_row_block(rows->count, [&](int64_t first, auto count) {
        constexpr int kCount = decltype(count)::kRows;
        HalfSums<kCount> sums(x_, first);
        const int64_t lines = first == 0 ? kBits / 2 + half : 0;
        for (int64_t i = 0; i < chunk.panels; ++i) {
          const uint8_t* panel = value_panel(a, chunk.panel[i], c);
          sums.template add<kBits>(panel + half * (kv_block_bytes(kBits) / 2), 2, i * kPanelTokens,
                                   [&] { keys->fetch(lines); });
        }
        for (int r = 0; r < kCount; ++r) {
          float* to = states + (first + r) * state_size(a) + c;
          const int64_t lanes = a.kv.values.d - c;
          store_n(to, add(load_n(to, lanes), sums.total(r)), lanes);
        }
      });
    }
  }

 private:
  static bool is_plain(const KVSide& side) { return side.table == nullptr && side.outliers == 0; }

  DigitRows x_{};
};

}  // namespace
}  // namespace ow::OW_TARGET
