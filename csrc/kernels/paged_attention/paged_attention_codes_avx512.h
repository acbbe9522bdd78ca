// Codes as they are: integer products, with the scales folded into the other side.
//
//   keys, channel axis    q . k^ = sum_c (q[c] scale[c]) code[c] + sum_c q[c] min[c]
//   values, token axis    sum_t p[t] v^[t] = sum_t (p[t] scale[t]) code[t] + sum_t p[t] min[t]
//
// What is in brackets, x, is rounded to base-256 digits on a scale of its row, as in
// kernels/quantize. Three digits where the type is fp32 or fp16: half a step is 1.004 * 2^-24 of
// the row's largest x, what fp32 itself would lose. Two for bf16: half a step is 1.004 * 2^-16 of
// the largest, so that what 128 of them may add up to is what rounding the largest to bf16 has
// lost. Half of that remains, as the difference of the sums of x and of what digits stand for goes
// in exactly, times the code in the middle: only a code's distance from there meets the errors.
//
// Sums of digits and codes are exact in int32: |digit| * code <= 128 * 255, times up to 256; and so
// are those of two digits joined: 32639 * 255 * 256 < 2^31.
#pragma once

#include "kernels/paged_attention/paged_attention_body.h"
#include "simd/codes_avx512.h"

namespace ow::OW_TARGET {
namespace {

// Bytes of the depth of a product.
constexpr int64_t kStep = 64;
constexpr int64_t kMaxDepth = 256;
static_assert(kMaxDepth >= kMaxPagedD && kMaxDepth >= kChunkTokens);

// Rows of digits as tiles, largest digit first, and what belongs to a row.
template <int kDigits>
struct DigitRows {
  // The largest whole number of balanced digits, 127 in each; of three, less what a product of
  // fp32 may round up.
  static constexpr int32_t kLargest = kDigits == 2 ? 127 * 257 : 127 * 65793 - 2;

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

// x[i] = a[i] * scales[i] in digits, zero up to a multiple of kStep; bias is sum_i a[i] * mins[i],
// and of two digits, what `middle` codes lose. Scale and bias are times `factor`.
template <int kDigits>
OW_INLINE void split_row(const float* a, const float* scales, const float* mins, int64_t n,
                         float middle, float factor, int64_t row, DigitRows<kDigits>* out) {
  alignas(64) float x[kMaxDepth];
  const int64_t padded = round_up(n, kStep);
  VecI largest = set1(int32_t{0});
  VecF bias = set1(0.0f);
  VecF total = set1(0.0f);
  const auto add_vector = [&](int64_t i, auto load_at) __attribute__((always_inline)) {
    const VecF element = load_at(a + i);
    const VecF product = mul(element, load_at(scales + i));
    bias = fma(element, load_at(mins + i), bias);
    if constexpr (kDigits == 2) total = add(total, product);
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
  float scale = 0.0f;
  float inverse_scale = 0.0f;
  if (most >= 0x7f800000) {
    scale = bits_to_float(0x7fc00000);
  } else if (most >= uint32_t(127 - 100) << 23) {
    constexpr float kLargest = DigitRows<kDigits>::kLargest;
    scale = bits_to_float(most) / kLargest;
    inverse_scale = kLargest / bits_to_float(most);
  }
  // Bytes of v + 0x80..80, less 0x80 each, are the balanced digits of v.
  const __m512i balance = _mm512_set1_epi32(kDigits == 2 ? 0x8080 : 0x808080);
  // Of two vectors, the highest byte of each lane and then the next; of three, the last.
  const __m512i high = every_fourth_byte(kDigits - 1, kDigits - 2);
  const __m512i low = every_fourth_byte(0, 3);
  const bool zero = inverse_scale == 0.0f;
  // A NaN times zero is NaN, which to_int would turn into INT_MIN.
  const __mmask16 lanes = zero ? 0 : 0xffff;
  const __m512i sign = _mm512_set1_epi8(zero ? 0 : char(0x80));
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t j = 0; j < padded; j += kStep) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512i whole = to_int(mul(load(x + j + k * kLanes), set1(inverse_scale))).v;
      v[k] = _mm512_maskz_add_epi32(lanes, whole, balance);
    }
    const auto put = [&](int64_t d, __m512i bytes) __attribute__((always_inline)) {
      bytes = _mm512_xor_si512(bytes, sign);
      _mm512_store_si512(out->digits[kDigits * row + d] + j, bytes);
      if constexpr (kDigits == 2) {
        sums[d] = _mm512_dpbusd_epi32(sums[d], _mm512_set1_epi8(1), bytes);
      }
    };
    const __m512i first = _mm512_permutex2var_epi8(v[0], high, v[1]);
    const __m512i second = _mm512_permutex2var_epi8(v[2], high, v[3]);
    put(0, _mm512_shuffle_i64x2(first, second, 0x44));
    put(1, _mm512_shuffle_i64x2(first, second, 0xee));
    if constexpr (kDigits == 3) {
      const __m512i third = _mm512_permutex2var_epi8(v[0], low, v[1]);
      const __m512i fourth = _mm512_permutex2var_epi8(v[2], low, v[3]);
      put(2, _mm512_shuffle_i64x2(third, fourth, 0x44));
    }
  }
  if constexpr (kDigits == 2) {
    const VecI whole = add(shift_left(VecI{sums[0]}, 8), VecI{sums[1]});
    const VecF lost = sub(total, mul(to_float(whole), set1(scale)));
    bias = fma(lost, set1(middle), bias);
  }
  out->scale[row] = scale * factor;
  out->bias[row] = sum(bias) * factor;
}

// The product of a row's digits, `sums` from the first on, scaled, and the row's bias.
template <int kDigits>
OW_INLINE VecF total_of(const DigitRows<kDigits>& x, int64_t r, const __m512i* sums) {
  VecF sum;
  if constexpr (kDigits == 2) {
    sum = to_float(add(shift_left(VecI{sums[0]}, 8), VecI{sums[1]}));
  } else {
    sum = fma(to_float(VecI{sums[1]}), set1(256.0f), to_float(VecI{sums[2]}));
    sum = fma(to_float(VecI{sums[0]}), set1(65536.0f), sum);
  }
  return fma(sum, set1(x.scale[r]), set1(x.bias[r]));
}

// Sums of kHalves halves of a panel, 16 columns each, and kCount rows from row `first` on, in
// registers: 12 or 16 for four rows, and four for the codes of a unit of a half. The dword of a row
// that meets the codes is the memory operand of a product, or of its load for two.
template <int kDigits, int kCount>
class PanelSums {
 public:
  static constexpr int kHalves = kDigits * kCount <= 8 ? 2 : 1;

  PanelSums(const DigitRows<kDigits>& x, int64_t first) : x_(x), first_(first) {
    for (auto& half : sums_) {
      for (__m512i& sum : half) sum = _mm512_setzero_si512();
    }
  }

  // Adds `units` units of 16 k, of which the first meets depth `depth` of the rows.
  template <int kBits, class Fetch>
  __attribute__((always_inline)) void add(const uint8_t* codes, int64_t units, int64_t depth,
                                          const Fetch& fetch) {
    // In variables of their own: the bytes that are read might be the members.
    __m512i sums[kHalves][kRows];
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) sums[h][i] = sums_[h][i];
    }
    const uint8_t* digits = x_.digits[kDigits * first_] + depth;
    for (int64_t unit = 0; unit < units; ++unit, digits += 16) {
      fetch();
      __m512i fours[kHalves][4];
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        unpack_unit<kBits>(codes + h * (kv_block_bytes(kBits) / 2), unit, fours[h]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
          int32_t four;
          memcpy(&four, digits + i * kMaxDepth + 4 * j, 4);
#pragma GCC unroll 2
          for (int h = 0; h < kHalves; ++h) {
            sums[h][i] = _mm512_dpbusd_epi32(sums[h][i], fours[h][j], _mm512_set1_epi32(four));
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) sums_[h][i] = sums[h][i];
    }
  }
  VecF total(int64_t half, int64_t r) const {
    return total_of(x_, first_ + r, sums_[half] + kDigits * r);
  }

 private:
  static constexpr int kRows = kDigits * kCount;

  const DigitRows<kDigits>& x_;
  int64_t first_;
  __m512i sums_[kHalves][kRows];
};

OW_INLINE float middle_code(const KVSide& side) { return float((1 << side.bits) - 1) / 2; }

// Scales of the keys of panel i in the queries, once for each group of tokens.
template <int kDigits>
OW_INLINE void split_queries(const Rows& rows, const Chunk& chunk, int64_t i,
                             DigitRows<kDigits>* x) {
  const KVSide& side = rows.a.kv.keys;
  if (i > 0 && chunk.panel[i].in_page % side.group_size != 0) return;
  const Grid grid(rows.a, side, chunk.panel[i]);
  for (int64_t r = 0; r < rows.count; ++r) {
    split_row(rows.q[r], grid.scales, grid.mins, side.d, middle_code(side), rows.a.scale, r, x);
  }
}

// Scales of the values in the weights, once for each group of channels.
template <int kDigits>
OW_INLINE void split_weights(const Rows& rows, const Chunk& chunk, int64_t channel,
                             DigitRows<kDigits>* x) {
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
    split_row(rows.scores[r], scales, mins, chunk.tokens, middle_code(side), 1.0f, r, x);
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

template <int kN>
struct Number {
  static constexpr int kValue = kN;
};
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
  return round_up(side.d, kv_block_k(side.bits)) / 16;
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
      split_queries(*rows, chunk, i, &x_);
      const uint8_t* panel = key_panel(a, chunk.panel[i]);
      for_each_row_block(rows->count, [&](int64_t first, auto count) {
        constexpr int kCount = decltype(count)::kRows;
        using Sums = PanelSums<kDigits, kCount>;
        for (int64_t half = 0; half < 2; half += Sums::kHalves) {
          Sums sums(x_, first);
          sums.template add<kBits>(panel + half * (kv_block_bytes(kBits) / 2), units, 0,
                                   [&] { fetch<kBits, Sums::kHalves>(first, half, values); });
          for (int r = 0; r < kCount; ++r) {
            float* to = rows->scores[first + r] + i * kPanelTokens + half * kLanes;
            for (int h = 0; h < Sums::kHalves; ++h) store(to + h * kLanes, sums.total(h, r));
          }
        }
      });
    }
  }

  template <int kBits>
  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead* keys) {
    const PagedAttentionArgs& a = rows->a;
    for (int64_t c = 0; c < a.kv.values.d; c += kKVPanel) {
      split_weights(*rows, chunk, c, &x_);
      for_each_row_block(rows->count, [&](int64_t first, auto count) {
        constexpr int kCount = decltype(count)::kRows;
        using Sums = PanelSums<kDigits, kCount>;
        for (int64_t half = 0; half < 2; half += Sums::kHalves) {
          Sums sums(x_, first);
          for (int64_t i = 0; i < chunk.panels; ++i) {
            const uint8_t* panel = value_panel(a, chunk.panel[i], c);
            sums.template add<kBits>(panel + half * (kv_block_bytes(kBits) / 2), 2,
                                     i * kPanelTokens,
                                     [&] { fetch<kBits, Sums::kHalves>(first, half, keys); });
          }
          for (int r = 0; r < kCount; ++r) {
            for (int h = 0; h < Sums::kHalves; ++h) {
              const int64_t channel = c + (half + h) * kLanes;
              const int64_t lanes = a.kv.values.d - channel;
              float* to = states + (first + r) * state_size(a) + channel;
              if (lanes <= 0) continue;
              store_n(to, add(load_n(to, lanes), sums.total(h, r)), lanes);
            }
          }
        }
      });
    }
  }

 private:
  // The other side's lines that go with a unit, and those of its scales, once for all rows.
  template <int kBits, int kHalves>
  static void fetch(int64_t first, int64_t half, PagesAhead* pages) {
    if (first == 0) pages->fetch(kHalves == 2 ? kBits + 1 : kBits / 2 + half);
  }

  DigitRows<kDigits> x_{};
};

}  // namespace
}  // namespace ow::OW_TARGET
