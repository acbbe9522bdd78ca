// AVX2 has no vpdpbusd. vpmaddubsw saturates at 16 bits, so codes are kept to 4 bits: 15 * 128 * 2
// a product pair, and four pairs still fit (15360). 8-bit codes go as two nibbles, the high one
// weighted 16 by vpmaddwd, so their sums are exact as well.
#include <immintrin.h>

#include "kernels/lowbit_gemm/lowbit_gemm.h"
#include "simd/vec.h"

namespace ow {
namespace avx2 {
namespace {

OW_INLINE __m256i broadcast4(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

OW_INLINE __m256i load_half(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Sub j of a unit for eight outputs, `line0` being their place in a first line of the panel.
template <int kBits>
OW_INLINE void unpack_unit(const uint8_t* line0, int64_t unit, __m256i s[4]) {
  if constexpr (kBits == 8) {
    for (int j = 0; j < 4; ++j) s[j] = load_half(line0 + unit * 512 + j * 64);
  } else if constexpr (kBits == 4) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int l = 0; l < 2; ++l) {
      const __m256i line = load_half(line0 + unit * 256 + l * 64);
      s[2 * l] = _mm256_and_si256(line, mask);
      s[2 * l + 1] = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
    }
  } else if constexpr (kBits == 2) {
    const __m256i mask = _mm256_set1_epi8(3);
    const __m256i line = load_half(line0 + unit * 128);
    s[0] = _mm256_and_si256(line, mask);
    s[1] = _mm256_and_si256(_mm256_srli_epi16(line, 2), mask);
    s[2] = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
    s[3] = _mm256_and_si256(_mm256_srli_epi16(line, 6), mask);
  } else {
    const uint8_t* block = line0 + unit / 2 * 384;
    const __m256i mask = _mm256_set1_epi8(7);
    const __m256i line1 = load_half(block + 64);
    const __m256i line2 = load_half(block + 128);
    // The code that lies in two places: its low bits, and its high bit moved to bit 2.
    const auto join = [](__m256i low, __m256i high) __attribute__((always_inline)) {
      low = _mm256_and_si256(_mm256_srli_epi16(low, 6), _mm256_set1_epi8(3));
      return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(4)));
    };
    if (unit % 2 == 0) {
      const __m256i first = load_half(block);
      s[0] = _mm256_and_si256(first, mask);
      s[1] = _mm256_and_si256(_mm256_srli_epi16(first, 3), mask);
      s[2] = join(first, _mm256_srli_epi16(line2, 4));
      s[3] = _mm256_and_si256(line1, mask);
    } else {
      s[0] = _mm256_and_si256(_mm256_srli_epi16(line1, 3), mask);
      s[1] = join(line1, _mm256_srli_epi16(line2, 5));
      s[2] = _mm256_and_si256(line2, mask);
      s[3] = _mm256_and_si256(_mm256_srli_epi16(line2, 3), mask);
    }
  }
}

// acc + sum over a unit of codes * digits.
template <int kBits>
OW_INLINE __m256i multiply_unit(__m256i acc, const __m256i s[4], const int8_t* x) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i low = _mm256_setzero_si256();
  __m256i high = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256i xj = broadcast4(x + j * 4);
    if constexpr (kBits == 8) {
      const __m256i top = _mm256_and_si256(_mm256_srli_epi16(s[j], 4), nibble);
      high = _mm256_add_epi16(high, _mm256_maddubs_epi16(top, xj));
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_and_si256(s[j], nibble), xj));
    } else {
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(s[j], xj));
    }
  }
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
  if constexpr (kBits == 8) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
  return acc;
}

OW_INLINE VecF load_scales(const LowbitGemmArgs& a, int64_t at) {
  switch (a.w_scales_type) {
    case FloatType::f32: return load(static_cast<const float*>(a.w_scales) + at);
    case FloatType::bf16: return load(static_cast<const bf16*>(a.w_scales) + at);
    default: return load(static_cast<const f16*>(a.w_scales) + at);
  }
}

// What a digit sum is multiplied by: see lowbit_sum_factor.
OW_INLINE __m256i load_minus_zeros(const LowbitGemmArgs& a, int64_t at) {
  if (a.w_zeros == nullptr) return _mm256_set1_epi32(1);
  int64_t bytes;
  memcpy(&bytes, a.w_zeros + at, 8);
  return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes)));
}

template <class T>
OW_INLINE void finish_row(const LowbitGemmArgs& a, int64_t row, int64_t n, VecF value) {
  const int64_t lanes = min_of(8, a.n - n);
  if (lanes <= 0) return;
  if (a.bias != nullptr) value = add(value, load_n(static_cast<const T*>(a.bias) + n, lanes));
  const int64_t at = row * a.n + n;
  if (a.add != nullptr) value = add(value, load_n(static_cast<const T*>(a.add) + at, lanes));
  store_n(static_cast<T*>(a.y) + at, value, lanes);
}

OW_INLINE void finish(const LowbitGemmArgs& a, int64_t row, int64_t n, VecF value) {
  if (a.digits == 1) value = mul(value, set1(a.x_scales[row]));
  switch (a.y_type) {
    case FloatType::f32: return finish_row<float>(a, row, n, value);
    case FloatType::bf16: return finish_row<bf16>(a, row, n, value);
    case FloatType::f16: return finish_row<f16>(a, row, n, value);
  }
}

// Half a panel (16 outputs, two vectors) for kRows rows of x.
template <int kBits, int kDigits, int kRows>
void rows_half(const LowbitGemmArgs& a, int64_t panel, int64_t half, int64_t row) {
  constexpr int kR = kRows * kDigits;
  const uint8_t* w =
      a.w + panel * panel_bytes(a.bits, a.k_padded) + half * (block_bytes(a.bits) / 2);
  // All digit rows are one block: those of a unit lie together.
  const int8_t* x = static_cast<const int8_t*>(a.x) + row * kDigits * kUnit;
  const int64_t unit_stride = a.x_blocks.rows * kUnit;
  VecF totals[kRows][2];
  for (auto& total : totals) total[0] = total[1] = set1(0.0f);
  for (int64_t g = 0; g < a.groups; ++g) {
    __m256i acc[kR][2];
    for (auto& pair : acc) pair[0] = pair[1] = _mm256_setzero_si256();
    const int64_t end = div_up(min_of((g + 1) * a.group_size, a.k), kUnit);
    for (int64_t unit = g * a.group_size / kUnit; unit < end; ++unit) {
      for (int v = 0; v < 2; ++v) {
        __m256i s[4];
        unpack_unit<kBits>(w + v * 32, unit, s);
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) {
          acc[r][v] = multiply_unit<kBits>(acc[r][v], s, x + unit * unit_stride + r * kUnit);
        }
      }
    }
    for (int v = 0; v < 2; ++v) {
      const int64_t at = (panel * a.groups + g) * kPanel + half * kHalf + v * 8;
      const VecF scale = load_scales(a, at);
      const __m256i minus_zero = load_minus_zeros(a, at);
      for (int r = 0; r < kRows; ++r) {
        VecF digit[kDigits];
        for (int d = 0; d < kDigits; ++d) {
          const int32_t sum = a.x_sums[((row + r) * kDigits + d) * a.groups + g];
          const __m256i correction = _mm256_mullo_epi32(minus_zero, _mm256_set1_epi32(sum));
          digit[d] = to_float(VecI{_mm256_add_epi32(acc[r * kDigits + d][v], correction)});
        }
        VecF sum = digit[0];
        if constexpr (kDigits == 3) {
          sum = fma(sum, set1(65536.0f), fma(digit[1], set1(256.0f), digit[2]));
          sum = mul(sum, set1(a.x_scales[(row + r) * a.groups + g]));
        }
        totals[r][v] = fma(sum, scale, totals[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) {
      finish(a, row + r, panel * kPanel + half * kHalf + v * 8, totals[r][v]);
    }
  }
}

// 16 registers: 4 rows x 2 vectors of accumulators beside the unpacked unit. Three digits of one
// row use six of the eight.
template <int kBits, int kDigits>
void rows_panels(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = kDigits == 1 ? 4 : 1;
  for (int64_t h = 2 * begin; h < 2 * end; ++h) {
    int64_t row = 0;
    for (; row + kBlock <= a.m; row += kBlock) {
      rows_half<kBits, kDigits, kBlock>(a, h / 2, h % 2, row);
    }
    for (; row < a.m; ++row) rows_half<kBits, kDigits, 1>(a, h / 2, h % 2, row);
  }
}

}  // namespace
}  // namespace avx2

void lowbit_gemm_rows_avx2(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  switch (a.bits * 4 + a.digits) {
    case 2 * 4 + 1: return avx2::rows_panels<2, 1>(a, begin, end);
    case 3 * 4 + 1: return avx2::rows_panels<3, 1>(a, begin, end);
    case 4 * 4 + 1: return avx2::rows_panels<4, 1>(a, begin, end);
    case 8 * 4 + 1: return avx2::rows_panels<8, 1>(a, begin, end);
    case 2 * 4 + 3: return avx2::rows_panels<2, 3>(a, begin, end);
    case 3 * 4 + 3: return avx2::rows_panels<3, 3>(a, begin, end);
    case 4 * 4 + 3: return avx2::rows_panels<4, 3>(a, begin, end);
    case 8 * 4 + 3: return avx2::rows_panels<8, 3>(a, begin, end);
  }
}

}  // namespace ow
