// Packed codes (csrc/README.md, "Packed weights") as bytes.
#pragma once

#include <immintrin.h>

#include "core/types.h"

namespace ow::OW_TARGET {
namespace {

OW_INLINE __m512i load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }

// The codes of unit `unit` of half a panel (`half` points at its first line) as bytes: s[j] holds
// k = 16 unit + 4 j + b in byte b of each lane, the operand order of vpdpbusd.
template <int kBits>
OW_INLINE void unpack_unit(const uint8_t* half, int64_t unit, __m512i s[4]) {
  if constexpr (kBits == 8) {
    for (int j = 0; j < 4; ++j) s[j] = load_line(half + unit * 512 + j * 64);
  } else if constexpr (kBits == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int l = 0; l < 2; ++l) {
      const __m512i line = load_line(half + unit * 256 + l * 64);
      s[2 * l] = _mm512_and_si512(line, mask);
      s[2 * l + 1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
    }
  } else if constexpr (kBits == 2) {
    const __m512i mask = _mm512_set1_epi8(3);
    const __m512i line = load_line(half + unit * 128);
    s[0] = _mm512_and_si512(line, mask);
    s[1] = _mm512_and_si512(_mm512_srli_epi16(line, 2), mask);
    s[2] = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
    s[3] = _mm512_and_si512(_mm512_srli_epi16(line, 6), mask);
  } else {
    const uint8_t* block = half + unit / 2 * 384;
    const __m512i mask = _mm512_set1_epi8(7);
    const __m512i line1 = load_line(block + 64);
    const __m512i line2 = load_line(block + 128);
    // The code that lies in two places: its low bits, and its high bit moved to bit 2. One
    // ternary-logic instruction selects and joins.
    const auto join = [](__m512i low, __m512i high) __attribute__((always_inline)) {
      low = _mm512_and_si512(_mm512_srli_epi16(low, 6), _mm512_set1_epi8(3));
      return _mm512_ternarylogic_epi64(low, high, _mm512_set1_epi8(4), 0xf8);  // low | (high & 4)
    };
    if (unit % 2 == 0) {
      const __m512i line0 = load_line(block);
      s[0] = _mm512_and_si512(line0, mask);
      s[1] = _mm512_and_si512(_mm512_srli_epi16(line0, 3), mask);
      s[2] = join(line0, _mm512_srli_epi16(line2, 4));
      s[3] = _mm512_and_si512(line1, mask);
    } else {
      s[0] = _mm512_and_si512(_mm512_srli_epi16(line1, 3), mask);
      s[1] = join(line1, _mm512_srli_epi16(line2, 5));
      s[2] = _mm512_and_si512(line2, mask);
      s[3] = _mm512_and_si512(_mm512_srli_epi16(line2, 3), mask);
    }
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
