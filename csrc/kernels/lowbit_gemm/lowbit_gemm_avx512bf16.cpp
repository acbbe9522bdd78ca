// bf16 activations against c - z, which is exact in bf16 (an integer of at most 8 bits and a sign),
// in vdpbf16ps: two products a lane into fp32. Same blocking as the VNNI tile kernel.
#include "kernels/lowbit_gemm/lowbit_gemm_avx512.h"

namespace ow {
namespace avx512bf16 {
namespace {

constexpr int64_t kTilePanels = 2;
constexpr int64_t kTileHalves = 2 * kTilePanels;
constexpr int64_t kTileRows = 6;
// 64 outputs x 128 k x 2 bytes = 16 KiB, half of L1.
constexpr int64_t kTileUnits = 8;
constexpr int64_t kPassRows = 96;

struct Tile {
  alignas(64) uint16_t weights[kTileUnits * 8][kTileHalves][32];
};

// Two floats that are small integers to a bf16 pair: their low mantissa halves are zero, so this
// is a shift and a blend, with no rounding to do.
OW_INLINE __m512i pair_bf16(VecF low, VecF high) {
  const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(low.v), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, shifted, _mm512_castps_si512(high.v));
}

template <int kBits>
void unpack_tile(const LowbitGemmArgs& a, int64_t panel, int64_t halves, int64_t g,
                 int64_t unit_begin, int64_t unit_end, Tile& tile) {
  const __m512i byte = _mm512_set1_epi32(255);
  for (int64_t h = 0; h < halves; ++h) {
    const uint8_t* half = half_of(a, panel, h);
    const __m512i zero = a.w_zeros == nullptr ? _mm512_set1_epi32(1 << (kBits - 1))
                                              : load_zeros(a, group_at(a, panel, h, g));
    const auto minus_zero = [&](__m512i code) __attribute__((always_inline)) {
      return to_float(VecI{_mm512_sub_epi32(_mm512_and_si512(code, byte), zero)});
    };
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      __m512i s[4];
      unpack_unit<kBits>(half, unit, s);
      uint16_t(*out)[kTileHalves][32] = tile.weights + (unit - unit_begin) * 8;
      for (int j = 0; j < 4; ++j) {
        const VecF k0 = minus_zero(s[j]);
        const VecF k1 = minus_zero(_mm512_srli_epi32(s[j], 8));
        const VecF k2 = minus_zero(_mm512_srli_epi32(s[j], 16));
        const VecF k3 = minus_zero(_mm512_srli_epi32(s[j], 24));
        _mm512_store_si512(out[2 * j][h], pair_bf16(k0, k1));
        _mm512_store_si512(out[2 * j + 1][h], pair_bf16(k2, k3));
      }
    }
  }
}

using Totals = float[kTileHalves][kHalf];

// totals += scale * (tile * x) for kR rows.
template <int kR>
OW_INLINE void multiply_tile(const Tile& tile, int64_t steps, const bf16* x, int64_t stride_x,
                             const VecF scales[kTileHalves], Totals* totals) {
  __m512 acc[kR][kTileHalves];
#pragma GCC unroll 6
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int h = 0; h < kTileHalves; ++h) acc[r][h] = _mm512_setzero_ps();
  }
  for (int64_t step = 0; step < steps; ++step) {
    __m512i w[kTileHalves];
#pragma GCC unroll 4
    for (int h = 0; h < kTileHalves; ++h) w[h] = _mm512_load_si512(tile.weights[step][h]);
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
      int32_t word;
      memcpy(&word, x + r * stride_x + step * 2, 4);
      const __m512i xr = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int h = 0; h < kTileHalves; ++h) {
        acc[r][h] = _mm512_dpbf16_ps(acc[r][h], (__m512bh)w[h], (__m512bh)xr);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int h = 0; h < kTileHalves; ++h) {
      store(totals[r][h], fma(VecF{acc[r][h]}, scales[h], load(totals[r][h])));
    }
  }
}

template <int kBits>
void tile_panels(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  Tile tile = {};  // panels past the end of a short tile are multiplied too, and dropped
  alignas(64) Totals totals[kPassRows];
  for (int64_t row_begin = 0; row_begin < a.m; row_begin += kPassRows) {
    const int64_t rows = min_of(kPassRows, a.m - row_begin);
    for (int64_t panel = begin; panel < end; panel += kTilePanels) {
      const int64_t halves = 2 * min_of(kTilePanels, end - panel);
      memset(totals, 0, size_t(rows) * sizeof(Totals));
      for (int64_t g = 0; g < a.groups; ++g) {
        VecF scales[kTileHalves];
        for (int64_t h = 0; h < kTileHalves; ++h) {
          scales[h] = h < halves ? load_scales(a, group_at(a, panel, h, g)) : set1(0.0f);
        }
        const int64_t group_end = group_unit_end(a, g);
        for (int64_t unit = group_unit_begin(a, g); unit < group_end; unit += kTileUnits) {
          const int64_t units = min_of(kTileUnits, group_end - unit);
          unpack_tile<kBits>(a, panel, halves, g, unit, unit + units, tile);
          const bf16* x = static_cast<const bf16*>(a.x) + row_begin * a.k_padded + unit * kUnit;
          int64_t r = 0;
          for (; r + kTileRows <= rows; r += kTileRows) {
            multiply_tile<kTileRows>(tile, units * 8, x + r * a.k_padded, a.k_padded, scales,
                                     totals + r);
          }
          for (; r < rows; ++r) {
            multiply_tile<1>(tile, units * 8, x + r * a.k_padded, a.k_padded, scales, totals + r);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t h = 0; h < halves; ++h) {
          finish(a, row_begin + r, panel * kPanel + h * kHalf, totals[r][h]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace avx512bf16

void lowbit_gemm_tile_64x6_avx512bf16(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  switch (a.bits) {
    case 2: return avx512bf16::tile_panels<2>(a, begin, end);
    case 3: return avx512bf16::tile_panels<3>(a, begin, end);
    case 4: return avx512bf16::tile_panels<4>(a, begin, end);
    case 8: return avx512bf16::tile_panels<8>(a, begin, end);
  }
}

}  // namespace ow
