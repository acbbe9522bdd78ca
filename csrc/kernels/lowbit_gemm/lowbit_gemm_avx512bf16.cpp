// bf16 activations against c - z, which is exact in bf16 (an integer of at most 8 bits and a sign),
// in vdpbf16ps: two products a lane into fp32. Same blocking as the VNNI tile kernel.
#include "kernels/lowbit_gemm/lowbit_gemm_avx512.h"

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
              next_tile(a, panel, end, unit + units, units, div_up(rows, kTileRowBlock));
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
