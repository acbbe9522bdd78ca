// bf16 activations against c - z in vdpbf16ps: two products a lane into fp32. Same blocking as the
// VNNI tile kernel.
#include "kernels/lowbit_gemm/lowbit_gemm_avx512bf16.h"

namespace ow {
namespace avx512bf16 {
namespace {

constexpr int64_t kTilePanels = 2;
constexpr int64_t kTileHalves = 2 * kTilePanels;
// 64 outputs x 128 k x 2 bytes = 16 KiB, half of L1.
constexpr int64_t kTileUnits = 8;
// Rows of x that share an unpacked tile. More than the L2 cache holds of x: the next block of rows
// is fetched while one is multiplied.
constexpr int64_t kPassRows = 384;

struct Tile {
  alignas(64) uint16_t weights[kTileUnits * 8][kTileHalves][32];
  // Of the group the tile lies in; zero past the last panel.
  alignas(64) float scales[kTileHalves][kHalf];
};

template <int kBits>
void unpack_tile(const LowbitGemmArgs& a, int64_t panel, int64_t halves, int64_t g,
                 int64_t unit_begin, int64_t unit_end, Tile& tile) {
  for (int64_t h = 0; h < halves; ++h) {
    const uint8_t* half = half_of(a, panel, h);
    const int64_t at = group_at(a, panel, h, g);
    store(tile.scales[h], load_scales(a, at));
    const Converter<kBits> converter(a.w_zeros == nullptr ? _mm512_set1_epi32(1 << (kBits - 1))
                                                          : load_zeros(a, at));
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      __m512i s[4];
      unpack_unit<kBits>(half, unit, s);
      uint16_t(*out)[kTileHalves][32] = tile.weights + (unit - unit_begin) * 8;
      for (int j = 0; j < 4; ++j) converter.convert(s[j], out[2 * j][h], out[2 * j + 1][h]);
    }
  }
}

using Totals = float[kTileHalves][kHalf];

// One block of rows of x against a tile.
struct BlockArgs {
  const Tile* tile;
  int64_t steps;     // of two k
  const bf16* x;     // rows of the block, from the tile's first unit on
  const bf16* next;  // of the block after it; need not be there
  Totals* totals;
};

// The two instructions of the inner loop, written out for the reasons given in
// lowbit_gemm_avx512.cpp.
OW_INLINE __m512i broadcast2(const bf16* p) {
  __m512i pair;
  asm volatile("vpbroadcastd %1, %0" : "=v"(pair) : "m"(*reinterpret_cast<const bf16(*)[2]>(p)));
  return pair;
}
// acc += two products a lane.
OW_INLINE void dot2(__m512& acc, __m512i w, __m512i x) {
  asm volatile("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
}

// totals += scale * (tile * x)
template <int kRows>
__attribute__((noinline)) void multiply_block(const BlockArgs& b) {
  __m512 acc[kRows][kTileHalves];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int h = 0; h < kTileHalves; ++h) acc[r][h] = _mm512_setzero_ps();
  }
  const uint16_t(*weights)[kTileHalves][32] = b.tile->weights;
  const bf16* x = b.x;
  const bf16* next = b.next;
  constexpr int64_t kStride = kTileRowBlock * kUnit;
  for (int64_t step = 0; step < b.steps; step += 8, weights += 8, x += kStride, next += kStride) {
    for (int64_t i = 0; i < kStride; i += 32) _mm_prefetch(next + i, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m512i w[kTileHalves];
#pragma GCC unroll 4
      for (int h = 0; h < kTileHalves; ++h) w[h] = _mm512_load_si512(weights[j][h]);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512i xr = broadcast2(x + r * kUnit + j * 2);
#pragma GCC unroll 4
        for (int h = 0; h < kTileHalves; ++h) dot2(acc[r][h], w[h], xr);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int h = 0; h < kTileHalves; ++h) {
      float* total = b.totals[r][h];
      store(total, fma(VecF{acc[r][h]}, load(b.tile->scales[h]), load(total)));
    }
  }
}

template <int kBits>
void tile_panels(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  Tile tile = {};  // halves past the last panel are multiplied too, and dropped
  alignas(64) Totals totals[kPassRows];
  for (int64_t row_begin = 0; row_begin < a.m; row_begin += kPassRows) {
    const int64_t rows = min_of(kPassRows, a.m - row_begin);
    for (int64_t panel = begin; panel < end; panel += kTilePanels) {
      const int64_t halves = 2 * min_of(kTilePanels, end - panel);
      memset(totals, 0, size_t(rows) * sizeof(Totals));
      for (int64_t g = 0; g < a.groups; ++g) {
        const int64_t group_end = group_unit_end(a, g);
        for (int64_t unit = group_unit_begin(a, g); unit < group_end; unit += kTileUnits) {
          const int64_t units = min_of(kTileUnits, group_end - unit);
          unpack_tile<kBits>(a, panel, halves, g, unit, unit + units, tile);
          NextTile next =
              next_tile<2>(a, panel, end, unit + units, units, div_up(rows, kTileRowBlock));
          for_each_row_block<kTileRowBlock>(rows, [&](int64_t r, auto block) {
            next.fetch_share();
            const int64_t row = row_begin + r;
            const bf16* x = static_cast<const bf16*>(a.x) +
                            row / kTileRowBlock * kTileRowBlock * a.k_padded +
                            unit * kUnit * kTileRowBlock + row % kTileRowBlock * kUnit;
            multiply_block<decltype(block)::kRows>(
                {&tile, units * 8, x, x + kTileRowBlock * a.k_padded, totals + r});
          });
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
