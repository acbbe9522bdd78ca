// VNNI kernels. vpdpbusd adds four products of unsigned codes and signed digits to an int32 lane.
#include "kernels/lowbit_gemm/lowbit_gemm_avx512.h"

namespace ow {
namespace avx512 {
namespace {

// The two instructions of the inner loops, written out. gcc 12 copies the accumulator round each
// vpdpbusd intrinsic, and hoists broadcasts until the accumulators no longer fit the 32 registers;
// volatile keeps the order below, in which one broadcast lives at a time. Together 2.3x in the tile
// kernel.
OW_INLINE __m512i broadcast4(const int8_t* p) {
  __m512i word;
  asm volatile("vpbroadcastd %1, %0" : "=v"(word) : "m"(*reinterpret_cast<const int8_t(*)[4]>(p)));
  return word;
}
// acc += four products a lane.
OW_INLINE void dot4(__m512i& acc, __m512i codes, __m512i digits) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(digits));
}

// --- rows: codes unpacked in registers, few rows of x --------------------------------------------
//
// One stream of weight bytes a thread, both halves of a panel at a time: each product needs a
// broadcast of x from memory, and loads, not products, would bind a single half. Up to 12 digit
// rows x 2 halves of accumulators; few rows get several accumulators each, since it takes 8 chains
// to keep two vpdpbusd a cycle of 4 cycles' latency going.
template <int kBits, int kDigits, int kRows>
void rows_panel(const LowbitGemmArgs& a, int64_t panel, int64_t row, int64_t fetch_ahead) {
  constexpr int kR = kRows * kDigits;
  constexpr int kUnitBytes = int(kUnit) * 4 * kBits;  // both halves
  // Where a line takes longer to multiply than to arrive, the processor's prefetchers do not run
  // far enough ahead, and stop at every page of 4 KiB: up to a third of the time (3 bits, m = 1).
  // Where memory is the limit they do better alone.
  constexpr bool kFetch = kBits <= 3 || kR >= (kBits == 4 ? 2 : 9);
  constexpr int kChains = kR == 1 ? 4 : kR <= 3 ? 2 : 1;
  const bool symmetric = a.w_zeros == nullptr;
  // All digit rows are one block: those of a unit lie together.
  const int8_t* x = static_cast<const int8_t*>(a.x) + row * kDigits * kUnit;
  const int64_t unit_stride = a.x_blocks.rows * kUnit;
  alignas(64) float totals[kRows][2][kHalf] = {};
  for (int64_t g = 0; g < a.groups; ++g) {
    const int32_t* x_sums = a.x_sums + row * kDigits * a.groups + g;
    __m512i acc[kChains][kR][2];
#pragma GCC unroll 12
    for (int r = 0; r < kR; ++r) {
      const __m512i start = _mm512_set1_epi32(symmetric ? x_sums[r * a.groups] : 0);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        acc[0][r][h] = start;
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) acc[c][r][h] = _mm512_setzero_si512();
      }
    }
    const int64_t end = group_unit_end(a, g);
    for (int64_t unit = group_unit_begin(a, g); unit < end; ++unit) {
      if constexpr (kFetch) {
        const uint8_t* ahead = half_of(a, panel, 0) + unit * kUnitBytes + fetch_ahead;
#pragma GCC unroll 8
        for (int i = 0; i < kUnitBytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
      }
      __m512i s[2][4];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) unpack_unit<kBits>(half_of(a, panel, h), unit, s[h]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 12
        for (int r = 0; r < kR; ++r) {
          const __m512i xr = broadcast4(x + unit * unit_stride + r * kUnit + j * 4);
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) dot4(acc[j % kChains][r][h], s[h][j], xr);
        }
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int64_t at = group_at(a, panel, h, g);
      const VecF scale = load_scales(a, at);
      const __m512i zeros = symmetric ? _mm512_setzero_si512() : load_zeros(a, at);
      __m512i sums[kR];
#pragma GCC unroll 12
      for (int r = 0; r < kR; ++r) {
        sums[r] = acc[0][r][h];
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) sums[r] = _mm512_add_epi32(sums[r], acc[c][r][h]);
        if (!symmetric) {
          const __m512i sum = _mm512_set1_epi32(x_sums[r * a.groups]);
          sums[r] = _mm512_sub_epi32(sums[r], _mm512_mullo_epi32(zeros, sum));
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float x_scale = kDigits == 3 ? a.x_scales[(row + r) * a.groups + g] : 1.0f;
        const VecF sum = group_sum<kDigits>(sums + r * kDigits, 1, x_scale);
        store(totals[r][h], fma(sum, scale, load(totals[r][h])));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < 2; ++h) finish(a, row + r, panel * kPanel + h * kHalf, totals[r][h]);
  }
}

template <int kBits, int kDigits>
void rows_range(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kMaxRows = kDigits == 1 ? 8 : 4;
  const int64_t passes = div_up(a.m, kMaxRows);
  // How far ahead weights are fetched. Of several passes over a panel, all but the first of which
  // find it in the cache, the last one fetches the next panel.
  constexpr int64_t kAhead = 2048;
  const int64_t next_panel = panel_bytes(kBits, a.k_padded);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      // Passes of equal size: 9 rows cost 5 + 4, not 8 + 1. Later passes find the panel in L2.
      const int64_t row = a.m * pass / passes;
      const int64_t ahead = passes > 1 && pass == passes - 1 ? next_panel : kAhead;
      const int64_t rows = a.m * (pass + 1) / passes - row;
      switch (rows) {
        case 1: rows_panel<kBits, kDigits, 1>(a, panel, row, ahead); break;
        case 2: rows_panel<kBits, kDigits, 2>(a, panel, row, ahead); break;
        case 3: rows_panel<kBits, kDigits, 3>(a, panel, row, ahead); break;
        case 4: rows_panel<kBits, kDigits, 4>(a, panel, row, ahead); break;
      }
      if constexpr (kDigits == 1) {
        switch (rows) {
          case 5: rows_panel<kBits, kDigits, 5>(a, panel, row, ahead); break;
          case 6: rows_panel<kBits, kDigits, 6>(a, panel, row, ahead); break;
          case 7: rows_panel<kBits, kDigits, 7>(a, panel, row, ahead); break;
          case 8: rows_panel<kBits, kDigits, 8>(a, panel, row, ahead); break;
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
constexpr int64_t kTilePanels = 2;
constexpr int64_t kTileHalves = 2 * kTilePanels;
constexpr int64_t kTileRows = kTileRowBlock;
// k of one tile: 64 outputs x 256 = 16 KiB, half of L1. A multiple of every group size but "row".
constexpr int64_t kTileUnits = 16;
// Digit rows of x that share an unpacked tile. More than the L2 cache holds of x: the next block of
// rows is fetched while one is multiplied.
constexpr int64_t kPassRows = 384;

struct Tile {
  alignas(64) uint8_t codes[kTileUnits * 4][kTileHalves][64];
  // Of the group the tile lies in; zero past the last panel.
  alignas(64) float scales[kTileHalves][kHalf];
  alignas(64) int32_t zeros[kTileHalves][kHalf];
};

using Totals = float[kTileHalves][kHalf];
// int32 sums so far of a group that is longer than a tile.
using Partial = int32_t[kTileHalves][kHalf];

// One block of rows of x against a tile.
struct BlockArgs {
  const Tile* tile;
  int64_t units;
  const int8_t* x;        // digit rows of the block, from the tile's first unit on
  const int8_t* next;     // of the block after it; need not be there
  const int32_t* x_sums;  // of the block's first digit row and the tile's group
  const float* x_scales;  // digits 3: of the block's first row and the tile's group
  int64_t groups;         // stride of both
  Partial* partial;
  Totals* totals;
};

template <int kBits>
void unpack_tile(const LowbitGemmArgs& a, int64_t panel, int64_t halves, int64_t g,
                 int64_t unit_begin, int64_t unit_end, Tile& tile) {
  for (int64_t h = 0; h < halves; ++h) {
    const uint8_t* half = half_of(a, panel, h);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      __m512i s[4];
      unpack_unit<kBits>(half, unit, s);
      for (int j = 0; j < 4; ++j) {
        _mm512_store_si512(tile.codes[(unit - unit_begin) * 4 + j][h], s[j]);
      }
    }
    const int64_t at = group_at(a, panel, h, g);
    store(tile.scales[h], load_scales(a, at));
    if (a.w_zeros != nullptr) _mm512_store_si512(tile.zeros[h], load_zeros(a, at));
  }
}

// partial or totals += tile * x. Its own function, with every choice a template argument: inlined,
// gcc 12 keeps half of the accumulators on the stack.
template <int kDigits, int kRows, bool kSymmetric, bool kFirst, bool kLast>
__attribute__((noinline)) void multiply_block(const BlockArgs& b) {
  constexpr int kR = kRows * kDigits;
  __m512i acc[kR][kTileHalves];
#pragma GCC unroll 6
  for (int r = 0; r < kR; ++r) {
    const __m512i start = _mm512_set1_epi32(kSymmetric ? b.x_sums[r * b.groups] : 0);
#pragma GCC unroll 4
    for (int h = 0; h < kTileHalves; ++h) {
      acc[r][h] = kFirst ? start : _mm512_load_si512(b.partial[r][h]);
    }
  }
  const int8_t* x = b.x;
  const int8_t* next = b.next;
  const uint8_t(*codes)[kTileHalves][64] = b.tile->codes;
  constexpr int64_t kStride = kTileRows * kUnit;
  for (int64_t unit = 0; unit < b.units; ++unit, codes += 4, x += kStride, next += kStride) {
    for (int64_t i = 0; i < kStride; i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i w[kTileHalves];
#pragma GCC unroll 4
      for (int h = 0; h < kTileHalves; ++h) w[h] = _mm512_load_si512(codes[j][h]);
#pragma GCC unroll 6
      for (int r = 0; r < kR; ++r) {
        const __m512i xr = broadcast4(x + r * kUnit + j * 4);
#pragma GCC unroll 4
        for (int h = 0; h < kTileHalves; ++h) dot4(acc[r][h], w[h], xr);
      }
    }
  }
  if constexpr (!kLast) {
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int h = 0; h < kTileHalves; ++h) _mm512_store_si512(b.partial[r][h], acc[r][h]);
    }
    return;
  }
  if constexpr (!kSymmetric) {
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
      const __m512i sum = _mm512_set1_epi32(b.x_sums[r * b.groups]);
#pragma GCC unroll 4
      for (int h = 0; h < kTileHalves; ++h) {
        const __m512i zeros = _mm512_load_si512(b.tile->zeros[h]);
        acc[r][h] = _mm512_sub_epi32(acc[r][h], _mm512_mullo_epi32(zeros, sum));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const float x_scale = kDigits == 3 ? b.x_scales[r * b.groups] : 1.0f;
#pragma GCC unroll 4
    for (int h = 0; h < kTileHalves; ++h) {
      const VecF sum = group_sum<kDigits>(&acc[r * kDigits][h], kTileHalves, x_scale);
      float* total = b.totals[r][h];
      store(total, fma(sum, load(b.tile->scales[h]), load(total)));
    }
  }
}

template <int kDigits, int kRows>
OW_INLINE void multiply_block_of(bool symmetric, bool first, bool last, const BlockArgs& b) {
  switch (symmetric * 4 + first * 2 + last) {
    case 0: return multiply_block<kDigits, kRows, false, false, false>(b);
    case 1: return multiply_block<kDigits, kRows, false, false, true>(b);
    case 2: return multiply_block<kDigits, kRows, false, true, false>(b);
    case 3: return multiply_block<kDigits, kRows, false, true, true>(b);
    case 4: return multiply_block<kDigits, kRows, true, false, false>(b);
    case 5: return multiply_block<kDigits, kRows, true, false, true>(b);
    case 6: return multiply_block<kDigits, kRows, true, true, false>(b);
    default: return multiply_block<kDigits, kRows, true, true, true>(b);
  }
}

template <int kBits, int kDigits>
void tile_range(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = kTileRows / kDigits;
  constexpr int64_t kMaxRows = kPassRows / kDigits;
  Tile tile = {};  // halves past the last panel are multiplied too, and dropped
  alignas(64) Totals totals[kMaxRows];
  alignas(64) Partial partial[kPassRows];
  const bool symmetric = a.w_zeros == nullptr;
  for (int64_t row_begin = 0; row_begin < a.m; row_begin += kMaxRows) {
    const int64_t rows = min_of(kMaxRows, a.m - row_begin);
    for (int64_t panel = begin; panel < end; panel += kTilePanels) {
      const int64_t halves = 2 * min_of(kTilePanels, end - panel);
      memset(totals, 0, size_t(rows) * sizeof(Totals));
      for (int64_t g = 0; g < a.groups; ++g) {
        const int64_t group_begin = group_unit_begin(a, g);
        const int64_t group_end = group_unit_end(a, g);
        for (int64_t unit = group_begin; unit < group_end; unit += kTileUnits) {
          const int64_t units = min_of(kTileUnits, group_end - unit);
          unpack_tile<kBits>(a, panel, halves, g, unit, unit + units, tile);
          NextTile next = next_tile<2>(a, panel, end, unit + units, units, div_up(rows, kBlock));
          for_each_row_block<kBlock>(rows, [&](int64_t r, auto block) {
            next.fetch_share();
            const int64_t row = row_begin + r;
            const int64_t digit_row = row * kDigits;
            const int8_t* x = static_cast<const int8_t*>(a.x) +
                              digit_row / kTileRows * kTileRows * a.k_padded +
                              unit * kUnit * kTileRows + digit_row % kTileRows * kUnit;
            const BlockArgs args{&tile,
                                 units,
                                 x,
                                 x + kTileRows * a.k_padded,
                                 a.x_sums + digit_row * a.groups + g,
                                 a.x_scales + (kDigits == 3 ? row * a.groups + g : 0),
                                 a.groups,
                                 partial + r * kDigits,
                                 totals + r};
            multiply_block_of<kDigits, decltype(block)::kRows>(symmetric, unit == group_begin,
                                                               unit + units == group_end, args);
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
}  // namespace avx512

#define OW_BY_BITS_AND_DIGITS(kernel)                           \
  switch (a.bits * 4 + a.digits) {                              \
    case 2 * 4 + 1: return avx512::kernel<2, 1>(a, begin, end); \
    case 3 * 4 + 1: return avx512::kernel<3, 1>(a, begin, end); \
    case 4 * 4 + 1: return avx512::kernel<4, 1>(a, begin, end); \
    case 8 * 4 + 1: return avx512::kernel<8, 1>(a, begin, end); \
    case 2 * 4 + 3: return avx512::kernel<2, 3>(a, begin, end); \
    case 3 * 4 + 3: return avx512::kernel<3, 3>(a, begin, end); \
    case 4 * 4 + 3: return avx512::kernel<4, 3>(a, begin, end); \
    case 8 * 4 + 3: return avx512::kernel<8, 3>(a, begin, end); \
  }

void lowbit_gemm_rows_avx512(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  OW_BY_BITS_AND_DIGITS(rows_range)
}

void lowbit_gemm_tile_64x6_avx512(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  OW_BY_BITS_AND_DIGITS(tile_range)
}

}  // namespace ow
