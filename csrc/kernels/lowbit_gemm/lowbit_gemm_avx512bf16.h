// Codes to bf16, for the tiers that have bf16 dot products. c - z is exact in bf16: an integer of
// at most 8 bits and a sign.
#pragma once

#include "kernels/lowbit_gemm/lowbit_gemm_avx512.h"

namespace ow::OW_TARGET {
namespace {

// bf16 of -15 .. 16.
struct Table {
  alignas(64) uint16_t entries[32];
  constexpr Table() : entries{} {
    for (int i = 0; i < 32; ++i) {
      entries[i] = uint16_t(__builtin_bit_cast(uint32_t, float(i - 15)) >> 16);
    }
  }
};
constexpr Table kTable;

// `first` in the first lane of each 128 bits, and `step` more in each next one.
OW_INLINE __m512i lanes(int first, int step) {
  return _mm512_set4_epi32(first + 3 * step, first + 2 * step, first + step, first);
}

// Two floats that are small integers to a bf16 pair: their low mantissa halves are zero, so there
// is nothing to round.
OW_INLINE __m512i pair_bf16(__m512i low, __m512i high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high);
}

// Codes to bf16 c - z. A product of vdpbf16ps takes two k from one 32-bit lane, so sub j of a unit,
// four codes of an output, makes two vectors.
template <int kBits>
class Converter {
 public:
  explicit Converter(__m512i zeros) {
    if constexpr (kBits == 8) {
      zeros_ = _mm512_add_epi32(zeros, _mm512_set1_epi32(kMagic));
    } else {
      const __m512i both = _mm512_or_si512(zeros, _mm512_slli_epi32(zeros, 16));
      zeros_ = _mm512_sub_epi16(_mm512_set1_epi16(15), both);
    }
  }

  void convert(__m512i codes, uint16_t* k01, uint16_t* k23) const {
    if constexpr (kBits == 8) {
      _mm512_store_si512(k01, pair_bf16(value(codes, 0), value(codes, 1)));
      _mm512_store_si512(k23, pair_bf16(value(codes, 2), value(codes, 3)));
    } else {
      _mm512_store_si512(k01, look_up(codes, int(0x80018000)));
      _mm512_store_si512(k23, look_up(codes, int(0x80038002)));
    }
  }

 private:
  // The bits of 2^23; a byte put into the lowest place adds itself.
  static constexpr int kMagic = 0x4b000000;

  // c - z of byte b of every lane.
  __m512i value(__m512i codes, int b) const {
    const __m512i c =
        _mm512_mask_shuffle_epi8(_mm512_set1_epi32(kMagic), 0x1111111111111111, codes, lanes(b, 4));
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(c), _mm512_castsi512_ps(zeros_)));
  }

  // c - z + 15 is in 0 .. 30, the place of c - z in the table. `bytes` says which two bytes of a
  // lane to spread over its halves.
  __m512i look_up(__m512i codes, int bytes) const {
    const __m512i spread = _mm512_shuffle_epi8(codes, lanes(bytes, 0x00040004));
    return _mm512_permutexvar_epi16(_mm512_add_epi16(spread, zeros_),
                                    _mm512_load_si512(kTable.entries));
  }

  __m512i zeros_;
};

}  // namespace
}  // namespace ow::OW_TARGET
