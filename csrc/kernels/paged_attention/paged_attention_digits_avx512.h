// Rows of floats times scales as digits, and what products of digits and codes add up to.
#pragma once

#include "kernels/paged_attention/paged_attention_body.h"
#include "kernels/paged_attention/paged_attention_two_digits_avx512.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kMaxDepth = 256;
static_assert(kMaxDepth >= kMaxPagedD && kMaxDepth >= kChunkTokens);

// Rows of digits as tiles, largest digit first, and what belongs to a row.
template <int kDigits>
struct DigitRows {
  alignas(64) uint8_t digits[kDigits * kMaxRows][kMaxDepth];
  float scale[kMaxRows];
  float bias[kMaxRows];

  const void* tile(int64_t t, int64_t depth) const { return digits[t * 16] + depth; }
};

// The largest whole number of balanced digits, 127 in each; of three, less what a product of fp32
// may round up; of two, less what a shared one may take from the first.
template <int kDigits, int kShared>
constexpr int32_t kLargest = kDigits == 3   ? 127 * 65793 - 2
                             : kShared == 1 ? 127 * 257
                                            : 256 * (127 - (128 >> 8 / kShared));

// Three digits of round(x[i] * inverse_scale), i < n.
OW_INLINE void put_three_digits(const float* x, int64_t n, VecF inverse_scale,
                                uint8_t (*digits)[kMaxDepth]) {
  const __m512i sign = _mm512_set1_epi8(char(0x80));
  const __m512i high = every_fourth_byte(2, 1);
  const __m512i low = every_fourth_byte(0, 3);
  for (int64_t j = 0; j < n; j += kStep) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const VecI whole = to_int(mul(load(x + j + k * kLanes), inverse_scale));
      v[k] = add(whole, set1(int32_t{0x808080})).v;
    }
    join_digits(_mm512_permutex2var_epi8(v[0], high, v[1]),
                _mm512_permutex2var_epi8(v[2], high, v[3]), sign, digits[0] + j, digits[1] + j);
    const __m512i lows = _mm512_shuffle_i64x2(_mm512_permutex2var_epi8(v[0], low, v[1]),
                                              _mm512_permutex2var_epi8(v[2], low, v[3]), 0x44);
    _mm512_store_si512(digits[2] + j, _mm512_xor_si512(lows, sign));
  }
}

// Scales and mins of a depth, in runs of `length`.
struct ScaleRuns {
  const KVSide& side;
  int64_t length;
  int64_t runs = 0;
  int64_t from[kChunkPanels] = {};

  int64_t depth() const { return runs * length; }

  // Calls body(depth of the first, load, scales, mins) vector by vector; load reads as many floats.
  template <class T, class Body>
  void for_each(const T*, const Body& body) const {
    const auto all = [](const float* p) __attribute__((always_inline)) { return load(p); };
    for (int64_t i = 0; i < runs; ++i) {
      const T* scales = static_cast<const T*>(side.scales) + from[i];
      const T* mins = static_cast<const T*>(side.mins) + from[i];
      int64_t j = 0;
      for (; j + kLanes <= length; j += kLanes) {
        body(i * length + j, all, load(scales + j), load(mins + j));
      }
      const int64_t rest = length - j;
      const auto some = [rest](const float* p)
                            __attribute__((always_inline)) { return load_n(p, rest); };
      if (rest > 0) body(i * length + j, some, load_n(scales + j, rest), load_n(mins + j, rest));
    }
  }
};

// Four rows' vectors are joined together, to lanes 4 r .. 4 r + 3 of row r: a quarter of the steps
// that wait for each other.
template <class Join>
OW_INLINE VecF across_lanes(const VecF (&rows)[4], const Join& join) {
  VecF halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = rows[2 * i].v;
    const __m512 b = rows[2 * i + 1].v;
    halves[i] = join({_mm512_shuffle_f32x4(a, b, 0x44)}, {_mm512_shuffle_f32x4(a, b, 0xee)});
  }
  const VecF fours = join({_mm512_shuffle_f32x4(halves[0].v, halves[1].v, 0x88)},
                          {_mm512_shuffle_f32x4(halves[0].v, halves[1].v, 0xdd)});
  const VecF twos = join(fours, {_mm512_permute_ps(fours.v, 0xb1)});
  return join(twos, {_mm512_permute_ps(twos.v, 0x4e)});
}
OW_INLINE VecF sums_across(const VecF (&rows)[4]) {
  return across_lanes(rows, [](VecF a, VecF b) { return add(a, b); });
}
OW_INLINE VecF largest_across(const VecF (&rows)[4]) {
  return across_lanes(rows, [](VecF a, VecF b) { return max_(a, b); });
}
OW_INLINE VecI sums_across(const VecI (&rows)[4]) {
  const VecF bits[4] = {as_float(rows[0]), as_float(rows[1]), as_float(rows[2]), as_float(rows[3])};
  return as_int(
      across_lanes(bits, [](VecF a, VecF b) { return as_float(add(as_int(a), as_int(b))); }));
}
OW_INLINE VecI largest_across(const VecI (&rows)[4]) {
  const VecF bits[4] = {as_float(rows[0]), as_float(rows[1]), as_float(rows[2]), as_float(rows[3])};
  return as_int(
      across_lanes(bits, [](VecF a, VecF b) { return as_float(max_(as_int(a), as_int(b))); }));
}
// What is in the lanes of row r, in all lanes.
OW_INLINE VecF row_of(VecF rows, int r) {
  return {_mm512_permutexvar_ps(_mm512_set1_epi32(4 * r), rows.v)};
}
// One lane of each row.
OW_INLINE void store_rows(float* to, VecF rows) {
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, rows.v)));
}

// What a digit stands for, and 1 over it, where the largest |x| are `most`, as bits. Numbers that
// are too small count as 0; NaN takes the place of what digits of numbers that are not finite give.
struct Steps {
  VecF scale, inverse;
};
template <int kDigits, int kShared>
OW_INLINE Steps steps_of(VecI most) {
  constexpr float kMost = kLargest<kDigits, kShared>;
  const __mmask16 some = _mm512_cmpge_epi32_mask(most.v, _mm512_set1_epi32((127 - 100) << 23));
  const __mmask16 not_finite = _mm512_cmpge_epi32_mask(most.v, _mm512_set1_epi32(0x7f800000));
  const __m512 x = as_float(most).v;
  const __m512 scale = _mm512_maskz_mul_ps(some, x, set1(1 / kMost).v);
  return {{_mm512_mask_blend_ps(not_finite, scale, set1(bits_to_float(0x7fc00000)).v)},
          {_mm512_maskz_div_ps(some, set1(kMost).v, x)}};
}

// x[r][i] = a[r][i] * scales[i] in digits, zero up to a whole block, of kCount rows from row
// `first`, a multiple of 4, on; bias is sum_i a[r][i] * mins[i], with `middle` codes in the mins
// and out of the product. Scale and bias are times `factor`. (One pass over x, with scales from
// bounds of the products, took as long: finding the bounds costs what the second pass does.)
template <int kDigits, int kShared, int kCount, class T>
OW_INLINE void split_rows(const float (*a)[kMaxDepth], const ScaleRuns& runs, const T* type,
                          float middle, float factor, int64_t first, DigitRows<kDigits>* out) {
  alignas(64) float x[kCount][kMaxDepth];
  const int64_t padded = round_up(runs.depth(), kDigitBlock<kShared>);
  VecI largest[4], sums[4];
  VecF bias[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    largest[r] = sums[r] = set1(int32_t{0});
    bias[r] = set1(0.0f);
  }
  const auto fold = [&](int64_t i, auto load_at, VecF s, VecF min) __attribute__((always_inline)) {
    min = fma(s, set1(middle), min);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const VecF element = load_at(a[first + r] + i);
      const VecF product = mul(element, s);
      bias[r] = fma(element, min, bias[r]);
      largest[r] = max_(largest[r], abs_bits(product));
      store(x[r] + i, product);
    }
  };
  runs.for_each(type, fold);
  for (int64_t i = round_up(runs.depth(), kLanes); i < padded; i += kLanes) {
    for (int r = 0; r < kCount; ++r) store(x[r] + i, set1(0.0f));
  }
  const Steps steps = steps_of<kDigits, kShared>(largest_across(largest));
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
    auto* digits = out->digits + kDigits * (first + r);
    VecF inverse = row_of(steps.inverse, r);
    if constexpr (kDigits == 2) {
      constexpr int64_t kBlock = kDigitBlock<kShared>;
      inverse = mul(inverse, load(kFactors<kShared>.at));
      const VecF offset = load(kOffsets<kShared>.at);
      for (int64_t i = 0; i < padded; i += kBlock) {
        VecF whole[kBlock / kLanes];
#pragma GCC unroll 8
        for (int j = 0; j < kBlock / kLanes; ++j) {
          whole[j] = fma(load(x[r] + i + j * kLanes), inverse, offset);
        }
        const VecI sum = put_two_digits<kShared>(whole, digits[0] + i, digits[1] + i / kShared);
        sums[r] = add(sums[r], sum);
      }
      const auto blocks = uint32_t(padded / kBlock);
      sums[r] = sub(sums[r], set1(int32_t(blocks * uint32_t(kBlockSum<kShared>))));
    } else {
      put_three_digits(x[r], padded, inverse, digits);
    }
  }
  VecF total = sums_across(bias);
  if constexpr (kDigits == 2) {
    total = fma(mul(to_float(sums_across(sums)), steps.scale), set1(-middle), total);
  }
  store_rows(out->scale + first, mul(steps.scale, set1(factor)));
  store_rows(out->bias + first, mul(total, set1(factor)));
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

// The code that digits meet the distance from.
template <int kDigits>
OW_INLINE float middle_code(const KVSide& side) {
  return kDigits == 2 ? float((1 << side.bits) - 1) / 2 : 0.0f;
}

template <int kDigits, int kShared>
OW_INLINE void split_rows(const float (*a)[kMaxDepth], const ScaleRuns& runs, FloatType type,
                          float factor, int64_t rows, DigitRows<kDigits>* x) {
  const float middle = middle_code<kDigits>(runs.side);
  const auto split = [&](const auto* elements) {
    for_each_row_block(rows, [&](int64_t first, auto count) __attribute__((always_inline)) {
      split_rows<kDigits, kShared, decltype(count)::kRows>(a, runs, elements, middle, factor, first,
                                                           x);
    });
  };
  if constexpr (kDigits == 2) return split(static_cast<const bf16*>(nullptr));
  if (type == FloatType::f32) return split(static_cast<const float*>(nullptr));
  split(static_cast<const f16*>(nullptr));
}

// Scales of the keys of panel i in the queries, once for each group of tokens.
template <int kShared, int kDigits>
OW_INLINE void split_queries(const Rows& rows, const Chunk& chunk, int64_t i,
                             DigitRows<kDigits>* x) {
  const PagedAttentionArgs& a = rows.a;
  const KVSide& side = a.kv.keys;
  if (i > 0 && chunk.panel[i].in_page % side.group_size != 0) return;
  ScaleRuns runs{side, side.d, 0, {}};
  runs.from[runs.runs++] = scale_at(a, side, chunk.panel[i], 0);
  split_rows<kDigits, kShared>(rows.q, runs, a.kv.type, a.scale, rows.count, x);
}

// Scales of the values in the weights, once for each group of channels.
template <int kShared, int kDigits>
OW_INLINE void split_weights(const Rows& rows, const Chunk& chunk, int64_t channel,
                             DigitRows<kDigits>* x) {
  const PagedAttentionArgs& a = rows.a;
  const KVSide& side = a.kv.values;
  if (channel % side.group_size != 0) return;
  ScaleRuns runs{side, kPanelTokens, 0, {}};
  for (int64_t i = 0; i < chunk.panels; ++i) {
    runs.from[runs.runs++] = scale_at(a, side, chunk.panel[i], channel);
  }
  split_rows<kDigits, kShared>(rows.scores, runs, a.kv.type, 1.0f, rows.count, x);
}

}  // namespace
}  // namespace ow::OW_TARGET
