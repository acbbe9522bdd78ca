// A tile: one panel's codes of a few k, unpacked to what the tile registers multiply.
#pragma once

#include "kernels/lowbit_gemm/lowbit_gemm_avx512amx.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kTileHalves = 2;
// k of a tile: its lines take 16 KiB (32 KiB of bf16) and the 16 rows of x they meet half of that.
constexpr int64_t kTileK = 512;
constexpr int64_t kTileGroups = kTileK / 16;

// Bytes of k of one row or output.
OW_INLINE constexpr int64_t depth_of(Kind kind, int64_t k) {
  return kind == Kind::kBf16 ? 2 * k : k;
}

template <Kind kKind>
struct Tile {
  alignas(64) uint8_t lines[kTileHalves][depth_of(kKind, kTileK) / 4][64];
};
// Scales and zeros of a tile.
struct Grid {
  alignas(64) float scales[kTileGroups][kTileHalves][kHalf];
  alignas(64) int32_t zeros[kTileGroups][kTileHalves][kHalf];
};

template <int kBits, Kind kKind>
void unpack_group(const uint8_t* half, const __m512i& zeros, int64_t unit_begin, int64_t unit_end,
                  uint8_t (*out)[64]) {
  if constexpr (kKind == Kind::kBf16) {
    const Converter<kBits> converter(zeros);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit, out += 8) {
      __m512i s[4];
      unpack_unit<kBits>(half, unit, s);
      for (int j = 0; j < 4; ++j) {
        converter.convert(s[j], reinterpret_cast<uint16_t*>(out[2 * j]),
                          reinterpret_cast<uint16_t*>(out[2 * j + 1]));
      }
    }
    return;
  }
  const __m512i bytes = kKind == Kind::kSigned
                            ? _mm512_mullo_epi32(zeros, _mm512_set1_epi32(0x01010101))
                            : _mm512_setzero_si512();
  for (int64_t unit = unit_begin; unit < unit_end; ++unit, out += 4) {
    __m512i s[4];
    unpack_unit<kBits>(half, unit, s);
    for (int j = 0; j < 4; ++j) _mm512_store_si512(out[j], _mm512_sub_epi8(s[j], bytes));
  }
}

// Units [begin, end).
template <int kBits, Kind kKind>
void unpack_tile(const LowbitGemmArgs& a, int64_t panel, int64_t begin, int64_t end,
                 Tile<kKind>& tile, Grid& grid) {
  const int64_t group_units = a.groups == 1 ? div_up(a.k, kUnit) : a.group_size / kUnit;
  for (int64_t h = 0; h < kTileHalves; ++h) {
    const uint8_t* half = half_of(a, panel, h);
    for (int64_t unit = begin; unit < end;) {
      const int64_t g = unit / group_units;
      const int64_t group_end = min_of((g + 1) * group_units, end);
      const int64_t at = group_at(a, panel, h, g);
      const __m512i zeros =
          a.w_zeros == nullptr ? _mm512_set1_epi32(1 << (kBits - 1)) : load_zeros(a, at);
      const int64_t in_tile = g - begin / group_units;
      store(grid.scales[in_tile][h], load_scales(a, at));
      _mm512_store_si512(grid.zeros[in_tile][h], zeros);
      unpack_group<kBits, kKind>(half, zeros, unit, group_end,
                                 tile.lines[h] + depth_of(kKind, (unit - begin) * kUnit) / 4);
      unit = group_end;
    }
  }
}

// Fetches scales and zeros of the tile after units [.., unit_end) of a panel: a few lines at a
// time, too few for the prefetchers to follow.
OW_INLINE void fetch_grid(const LowbitGemmArgs& a, int64_t panel, int64_t end, int64_t unit_end) {
  const int64_t k = unit_end * kUnit < a.k ? unit_end * kUnit : 0;
  if (k == 0) ++panel;
  if (panel == end) return;
  const int64_t groups = div_up(min_of(kTileK, a.k - k), a.group_size);
  const int64_t at = (panel * a.groups + k / a.group_size) * kPanel;
  const int64_t size = a.w_scales_type == FloatType::f32 ? 4 : 2;
  const uint8_t* scales = static_cast<const uint8_t*>(a.w_scales) + at * size;
  for (int64_t i = 0; i < groups * kPanel * size; i += 64) _mm_prefetch(scales + i, _MM_HINT_T0);
  if (a.w_zeros == nullptr) return;
  for (int64_t i = 0; i < groups * kPanel; i += 64) _mm_prefetch(a.w_zeros + at + i, _MM_HINT_T0);
}

// Fetches the lines of y that finish_block will write. They lie a row apart and miss every cache:
// waiting for each took a fifth of the time at 512 rows.
OW_INLINE void fetch_y(const LowbitGemmArgs& a, int64_t panel, int64_t row) {
  const int64_t size = a.y_type == FloatType::f32 ? 4 : 2;
  const uint8_t* y = static_cast<const uint8_t*>(a.y) + (row * a.n + panel * kPanel) * size;
  for (int64_t r = 0; r < min_of(kAmxRows, a.m - row); ++r, y += a.n * size) {
    fetch_to_write(y);
    if (size == 4) fetch_to_write(y + 64);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
