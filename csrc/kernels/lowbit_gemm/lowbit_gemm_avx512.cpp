// VNNI kernels. vpdpbusd adds four products of unsigned codes and signed digits to an int32 lane.
#include "kernels/lowbit_gemm/lowbit_gemm_avx512.h"

namespace ow {
namespace avx512 {
namespace {

OW_INLINE __m512i broadcast4(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// --- rows: one panel at a time, codes unpacked in registers, few rows of x ----------------------
//
// One stream of weight bytes a thread. A unit costs 1 to 4 loads and at most 14 instructions to
// unpack, then 4 products for each row of digits. With one or two rows the products of a unit go to
// separate accumulators: one chain would wait 4 cycles for each vpdpbusd, longer than the
// bytes take to arrive.
template <int kBits, int kDigits, int kRows>
void rows_panel(const LowbitGemmArgs& a, int64_t panel, int64_t row) {
  constexpr int kR = kRows * kDigits;
  constexpr int kChains = kR == 1 ? 4 : kR <= 4 ? 2 : 1;
  const uint8_t* w = a.w + panel * panel_bytes(a);
  const int8_t* x = static_cast<const int8_t*>(a.x) + row * kDigits * a.k_padded;
  alignas(64) float totals[kRows][kPanel] = {};
  for (int64_t g = 0; g < a.groups; ++g) {
    __m512i acc[kR][kChains];
    for (int r = 0; r < kR; ++r) {
      for (int c = 0; c < kChains; ++c) acc[r][c] = _mm512_setzero_si512();
    }
    const int64_t end = group_unit_end(a, g);
    for (int64_t unit = group_unit_begin(a, g); unit < end; ++unit) {
      __m512i s[4];
      unpack_unit<kBits>(w, unit, s);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 16
        for (int r = 0; r < kR; ++r) {
          acc[r][j % kChains] = _mm512_dpbusd_epi32(
              acc[r][j % kChains], s[j], broadcast4(x + r * a.k_padded + unit * kUnit + j * 4));
        }
      }
    }
    __m512i sums[kR];
    for (int r = 0; r < kR; ++r) {
      sums[r] = acc[r][0];
      for (int c = 1; c < kChains; ++c) sums[r] = _mm512_add_epi32(sums[r], acc[r][c]);
    }
    add_group<kDigits, kRows>(a, panel, g, row, sums, 1, totals[0], kPanel);
  }
  for (int r = 0; r < kRows; ++r) finish(a, row + r, panel, totals[r]);
}

template <int kBits, int kDigits>
void rows_panels(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  // Accumulators that fit beside the unpacked unit: 8 rows of int8, or 4 of three digits.
  constexpr int64_t kMaxRows = kDigits == 1 ? 8 : 4;
  const int64_t passes = div_up(a.m, kMaxRows);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      // Passes of equal size: 9 rows cost 5 + 4, not 8 + 1. Later passes find the panel in L2.
      const int64_t row = a.m * pass / passes;
      switch (a.m * (pass + 1) / passes - row) {
        case 1: rows_panel<kBits, kDigits, 1>(a, panel, row); break;
        case 2: rows_panel<kBits, kDigits, 2>(a, panel, row); break;
        case 3: rows_panel<kBits, kDigits, 3>(a, panel, row); break;
        case 4: rows_panel<kBits, kDigits, 4>(a, panel, row); break;
        default:
          if constexpr (kDigits == 1) {
            switch (a.m * (pass + 1) / passes - row) {
              case 5: rows_panel<kBits, kDigits, 5>(a, panel, row); break;
              case 6: rows_panel<kBits, kDigits, 6>(a, panel, row); break;
              case 7: rows_panel<kBits, kDigits, 7>(a, panel, row); break;
              default: rows_panel<kBits, kDigits, 8>(a, panel, row); break;
            }
          }
      }
    }
  }
}

// --- tile: 64 outputs unpacked to L1 once for many rows ------------------------------------------
//
// The microkernel keeps 6 rows x 4 vectors = 24 accumulators; each step of 4 k loads 4 vectors of
// codes and 6 broadcasts for 24 products, so neither loads nor latency (4 cycles x 2 a cycle = 8
// chains) bind.
constexpr int64_t kTilePanels = 4;
constexpr int64_t kTileRows = 6;
// k of one tile: 64 outputs x 256 = 16 KiB, half of L1. A multiple of every group size but "row".
constexpr int64_t kTileUnits = 16;
// Digit rows of x per pass over the weight: x (192 x k) stays in L2 while each tile is unpacked
// once for all of them.
constexpr int64_t kPassRows = 192;

struct Tile {
  alignas(64) uint8_t codes[kTileUnits * 4][kTilePanels][64];
};

template <int kBits>
void unpack_tile(const LowbitGemmArgs& a, int64_t panel, int64_t panels, int64_t unit_begin,
                 int64_t unit_end, Tile& tile) {
  for (int64_t p = 0; p < panels; ++p) {
    const uint8_t* w = a.w + (panel + p) * panel_bytes(a);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      __m512i s[4];
      unpack_unit<kBits>(w, unit, s);
      for (int j = 0; j < 4; ++j) {
        _mm512_store_si512(tile.codes[(unit - unit_begin) * 4 + j][p], s[j]);
      }
    }
  }
}

using Accumulators = int32_t[kTilePanels][kPanel];

// acc (+)= tile * x for kR digit rows. `partial` carries the sums of a group longer than a tile.
template <int kR>
OW_INLINE void multiply_tile(const Tile& tile, int64_t steps, const int8_t* x, int64_t stride_x,
                             bool first, Accumulators* partial) {
  __m512i acc[kR][kTilePanels];
  for (int r = 0; r < kR; ++r) {
    for (int p = 0; p < kTilePanels; ++p) {
      acc[r][p] = first ? _mm512_setzero_si512() : _mm512_load_si512(partial[r][p]);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    __m512i w[kTilePanels];
#pragma GCC unroll 4
    for (int p = 0; p < kTilePanels; ++p) w[p] = _mm512_load_si512(tile.codes[step][p]);
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
      const __m512i xr = broadcast4(x + r * stride_x + step * 4);
#pragma GCC unroll 4
      for (int p = 0; p < kTilePanels; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], w[p], xr);
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int p = 0; p < kTilePanels; ++p) _mm512_store_si512(partial[r][p], acc[r][p]);
  }
}

template <int kDigits>
struct Pass {
  static constexpr int64_t kRows = kPassRows / kDigits;
  alignas(64) float totals[kRows][kTilePanels][kPanel];
  alignas(64) Accumulators sums[kPassRows];
};

// One block of kRows rows of x against the tile; at the end of a group, into the totals.
template <int kDigits, int kRows>
OW_INLINE void tile_rows(const LowbitGemmArgs& a, const Tile& tile, int64_t panel, int64_t panels,
                         int64_t g, int64_t unit, int64_t units, int64_t row, int64_t pass_row,
                         bool first, bool last, Pass<kDigits>& pass) {
  const int8_t* x = static_cast<const int8_t*>(a.x) + row * kDigits * a.k_padded + unit * kUnit;
  Accumulators* sums = pass.sums + pass_row * kDigits;
  multiply_tile<kRows * kDigits>(tile, units * 4, x, a.k_padded, first, sums);
  if (!last) return;
  for (int64_t p = 0; p < panels; ++p) {
    add_group<kDigits, kRows>(a, panel + p, g, row,
                              reinterpret_cast<const __m512i*>(sums[0][p]), kTilePanels,
                              pass.totals[pass_row][p], kTilePanels * kPanel);
  }
}

template <int kBits, int kDigits>
void tile_panels(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = kTileRows / kDigits;
  Tile tile = {};  // panels past the end of a short tile are multiplied too, and dropped
  Pass<kDigits> pass;
  for (int64_t row_begin = 0; row_begin < a.m; row_begin += pass.kRows) {
    const int64_t rows = min_of(pass.kRows, a.m - row_begin);
    for (int64_t panel = begin; panel < end; panel += kTilePanels) {
      const int64_t panels = min_of(kTilePanels, end - panel);
      memset(pass.totals, 0, size_t(rows) * sizeof(pass.totals[0]));
      for (int64_t g = 0; g < a.groups; ++g) {
        const int64_t group_begin = group_unit_begin(a, g);
        const int64_t group_end = group_unit_end(a, g);
        for (int64_t unit = group_begin; unit < group_end; unit += kTileUnits) {
          const int64_t units = min_of(kTileUnits, group_end - unit);
          const bool first = unit == group_begin;
          const bool last = unit + units == group_end;
          unpack_tile<kBits>(a, panel, panels, unit, unit + units, tile);
          int64_t r = 0;
          for (; r + kBlock <= rows; r += kBlock) {
            tile_rows<kDigits, kBlock>(a, tile, panel, panels, g, unit, units, row_begin + r, r,
                                       first, last, pass);
          }
          for (; r < rows; ++r) {
            tile_rows<kDigits, 1>(a, tile, panel, panels, g, unit, units, row_begin + r, r, first,
                                  last, pass);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t p = 0; p < panels; ++p) {
          finish(a, row_begin + r, panel + p, pass.totals[r][p]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace avx512

#define OW_BY_BITS_AND_DIGITS(kernel)                                                  \
  switch (a.bits * 4 + a.digits) {                                                     \
    case 2 * 4 + 1: return avx512::kernel<2, 1>(a, begin, end);                        \
    case 3 * 4 + 1: return avx512::kernel<3, 1>(a, begin, end);                        \
    case 4 * 4 + 1: return avx512::kernel<4, 1>(a, begin, end);                        \
    case 8 * 4 + 1: return avx512::kernel<8, 1>(a, begin, end);                        \
    case 2 * 4 + 3: return avx512::kernel<2, 3>(a, begin, end);                        \
    case 3 * 4 + 3: return avx512::kernel<3, 3>(a, begin, end);                        \
    case 4 * 4 + 3: return avx512::kernel<4, 3>(a, begin, end);                        \
    case 8 * 4 + 3: return avx512::kernel<8, 3>(a, begin, end);                        \
  }

void lowbit_gemm_rows_avx512(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  OW_BY_BITS_AND_DIGITS(rows_panels)
}

void lowbit_gemm_tile_64x6_avx512(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  OW_BY_BITS_AND_DIGITS(tile_panels)
}

}  // namespace ow
