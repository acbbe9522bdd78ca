// Numbers as two digits of base 256, for products with codes.
//
// On its own, x is d and e with x ~ step (256 d + e), rounded by half a step. Codes of 4 or 2 bits
// do not need as much, and the n = 8 / bits of a byte share e:
//
//   x_j ~ step (256 d_j + 2^(bits j) e)
//   sum_j x_j c_j ~ step (256 sum_j d_j c_j + e sum_j 2^(bits j) c_j)
//
// The last sum is the byte as it lies in memory: n + 1 products take the place of 2 n. Of e the
// lowest bits are the fraction that x_{n-1} / (256 step) has, which decides d_{n-1}; x_{n-2} then
// chooses the next bits of e, and so on. Each x_j is rounded by half of 2^(8 - bits) steps and,
// where that is less, by half of 2^(bits j) before. As rms, over uniform codes, that moves a sum by
// less than a twentieth of what rounding to codes has moved it by, even where one of 256 numbers
// outweighs the others together.
#pragma once

#include <immintrin.h>

#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Bytes of the depth of a product.
constexpr int64_t kStep = 64;

// Codes whose numbers share a digit; 1: none.
template <int kBits, int kDigits>
constexpr int kSharing = kDigits == 2 && (kBits == 4 || kBits == 2) ? 8 / kBits : 1;

// Numbers that become digits together.
template <int kShared>
constexpr int64_t kDigitBlock = kShared == 1 ? kStep : 32 * kShared;

template <class T, int kCount>
struct alignas(64) Table {
  T at[kCount];
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

// Two vectors' highest digits and their next ones as vectors of both.
OW_INLINE void join_digits(__m512i first, __m512i second, __m512i sign, uint8_t* high,
                           uint8_t* low) {
  const __m512i highs = _mm512_shuffle_i64x2(first, second, 0x44);
  const __m512i lows = _mm512_shuffle_i64x2(first, second, 0xee);
  _mm512_store_si512(high, _mm512_xor_si512(highs, sign));
  _mm512_store_si512(low, _mm512_xor_si512(lows, sign));
}

// A whole number is in the low bits of its sum with this, half of it too large.
constexpr float kWhole = 12582912.0f;

// Of the lanes that digits are made of, `factor * x / step + offset`. Alone: bytes of v + 0x8080,
// less 0x80 each, are the balanced digits of v. Shared: v is x in steps of 2^(bits j); e is to have
// 0x80 in it likewise, and half of the bits that are given already is added to round.
template <int kShared>
constexpr auto kFactors = [] {
  Table<float, 16> factors{};
  for (int l = 0; l < 16; ++l) factors.at[l] = 1.0f / float(1 << 8 / kShared * (l / 4 % kShared));
  return factors;
}();
template <int kShared>
constexpr auto kOffsets = [] {
  Table<float, 16> offsets{};
  for (int l = 0; l < 16; ++l) {
    const int after = kShared - 1 - l / 4 % kShared;
    const int half = after == 0 ? 0 : (1 << 8 / kShared * after) / 2;
    offsets.at[l] = kWhole + float(kShared == 1 ? 0x8080 : 0x80 + half);
  }
  return offsets;
}();

// What `put_two_digits` adds, with every block of numbers, to each lane of their sum.
template <int kShared>
constexpr int32_t kBlockSum =
    kShared == 1 ? int32_t(4 * __builtin_bit_cast(uint32_t, kWhole + float(0x8080)))
                 : 256 * (255 / ((1 << 8 / kShared) - 1));

// The numbers of a block as words: those of code j of the bytes in order.
template <int kShared>
OW_INLINE void words_by_code(const VecF* whole, __m512i (&words)[kShared]) {
  static constexpr auto kPlaces = [] {
    Table<uint16_t, 32> places{};
    for (int i = 0; i < 32; ++i) {
      const int each = 32 / kShared;
      places.at[i] = uint16_t(2 * (4 * (kShared * (i % each / 4) + i / each) + i % 4));
    }
    return places;
  }();
  const __m512i places = _mm512_load_si512(kPlaces.at);
  __m512i pairs[kShared];
#pragma GCC unroll 4
  for (int i = 0; i < kShared; ++i) {
    pairs[i] =
        _mm512_permutex2var_epi16(as_int(whole[2 * i]).v, places, as_int(whole[2 * i + 1]).v);
  }
  if constexpr (kShared == 2) {
    words[0] = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0x44);
    words[1] = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0xee);
  } else {
    const __m512i a = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0x44);
    const __m512i b = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0x44);
    const __m512i c = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0xee);
    const __m512i d = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0xee);
    words[0] = _mm512_shuffle_i64x2(a, b, 0x88);
    words[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
    words[2] = _mm512_shuffle_i64x2(c, d, 0x88);
    words[3] = _mm512_shuffle_i64x2(c, d, 0xdd);
  }
}

// Byte 1 of words of `first` and byte 0 of words of `second`, four by four.
OW_INLINE __m512i high_and_low_bytes(__m512i first, __m512i second) {
  static constexpr auto kBytes = [] {
    Table<uint8_t, 64> bytes{};
    for (int i = 0; i < 64; ++i) {
      const int word = i / 8 * 4 + i % 4;
      bytes.at[i] = uint8_t(i / 4 % 2 == 0 ? 2 * word + 1 : 64 + 2 * word);
    }
    return bytes;
  }();
  return _mm512_permutex2var_epi8(first, _mm512_load_si512(kBytes.at), second);
}

template <int kShared>
OW_INLINE void put_first_digits(const __m512i (&words)[kShared], uint8_t* digits) {
  const __m512i first = high_and_low_bytes(words[0], words[1]);
  if constexpr (kShared == 2) {
    _mm512_store_si512(digits, first);
  } else {
    const __m512i second = high_and_low_bytes(words[2], words[3]);
    const __m512i begin = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i end = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_store_si512(digits, _mm512_permutex2var_epi64(first, begin, second));
    _mm512_store_si512(digits + 64, _mm512_permutex2var_epi64(first, end, second));
  }
}

// Digits d and e of a block of numbers; gives their sum in steps, by lanes.
template <int kShared>
OW_INLINE VecI put_two_digits(const VecF* whole, uint8_t* d, uint8_t* e) {
  if constexpr (kShared == 1) {
    const __m512i bytes = every_fourth_byte(1, 0);
    const VecI v[4] = {as_int(whole[0]), as_int(whole[1]), as_int(whole[2]), as_int(whole[3])};
    join_digits(_mm512_permutex2var_epi8(v[0].v, bytes, v[1].v),
                _mm512_permutex2var_epi8(v[2].v, bytes, v[3].v), _mm512_set1_epi8(char(0x80)), d,
                e);
    return add(add(v[0], v[1]), add(v[2], v[3]));
  } else {
    constexpr int kBits = 8 / kShared;
    __m512i words[kShared];
    words_by_code<kShared>(whole, words);
    // The nearest number with the bits of e that are given.
#pragma GCC unroll 4
    for (int j = kShared - 2; j >= 0; --j) {
      const __m512i mask = _mm512_set1_epi16(short((1 << kBits * (kShared - 1 - j)) - 1));
      const __m512i given = _mm512_and_si512(words[j + 1], mask);
      words[j] = _mm512_ternarylogic_epi64(mask, given, _mm512_sub_epi16(words[j], given), 0xca);
    }
    VecI sum = set1(int32_t{0});
#pragma GCC unroll 4
    for (int j = 0; j < kShared; ++j) {
      sum.v = _mm512_dpwssd_epi32(sum.v, words[j], _mm512_set1_epi16(short(1 << kBits * j)));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(e),
                       _mm256_xor_si256(_mm512_cvtepi16_epi8(words[0]), _mm256_set1_epi8(-128)));
    const __m512i shared = _mm512_and_si512(words[0], _mm512_set1_epi16(255));
#pragma GCC unroll 4
    for (int j = 1; j < kShared; ++j) words[j] = _mm512_sub_epi16(words[j], shared);
    // d to byte 1 and byte 0 in turn.
    if constexpr (kShared == 2) {
      words[1] = _mm512_srli_epi16(words[1], 4);
    } else {
      words[1] = _mm512_srli_epi16(words[1], 6);
      words[2] = _mm512_slli_epi16(words[2], 4);
      words[3] = _mm512_srli_epi16(words[3], 2);
    }
    put_first_digits<kShared>(words, d);
    return sum;
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
