// AMX kernels. A tile register holds 16 rows of 64 bytes, and one product adds to 16 x 16 sums
//
//   sums[16 rows of x, 16 outputs] += x[16 rows, 64 bytes of k] * lines[16 lines of 4 bytes of k]
//
// 64 k of int8, or 32 k of bf16. A line, 16 outputs x 4 bytes, is that of the packed layout; only
// its codes are unpacked. Codes become signed c - z where that fits a byte, and x needs no sums.
//
// A product takes 16 cycles and its sums are ready after 52, so four are kept going: on four runs
// of k, whose sums are then scaled and added to float totals in registers, 16 rows x 16 outputs at
// a time. Measured: 25 to 30 % of the peak. Loads, products and sums each take a third of the time,
// and overlap little: neither adding up the runs before while these are multiplied, nor storing to
// other addresses, nor two panels at a time gained anything.
#include "kernels/lowbit_gemm/lowbit_gemm_avx512amx.h"

namespace ow {
namespace avx512amx {
namespace {

constexpr int64_t kTileHalves = 2;
// Lines of a half, 8 KiB: both halves and the 16 rows of x they meet stay in L1.
constexpr int64_t kTileLines = 128;
// Bytes of a row of x that meet a tile: 4 a line, 512 k of int8 or 256 of bf16.
constexpr int64_t kTileDepth = kTileLines * 4;
constexpr int64_t kTileGroups = 512 / 16;
// Digit rows of x that share an unpacked tile, at most; and their bytes, of an L2 cache of 2 MiB.
constexpr int64_t kPassRows = 528;
constexpr int64_t kPassBytes = 1 << 20;

OW_INLINE constexpr int64_t depth_of(Kind kind, int64_t k) {
  return kind == Kind::kBf16 ? 2 * k : k;
}

struct Tile {
  alignas(64) uint8_t lines[kTileHalves][kTileLines][64];
  alignas(64) float scales[kTileGroups][kTileHalves][kHalf];
  alignas(64) int32_t zeros[kTileGroups][kTileHalves][kHalf];
};

// Of 16 rows and 16 outputs: float totals; while a group is longer than a tile, its int32 sums.
union Block {
  alignas(64) float totals[kAmxRows][kHalf];
  alignas(64) int32_t sums[kAmxRows][kHalf];
};

// Rows of one pass over the weight, of passes of equal size. A row's digits take `row_bytes`.
int64_t rows_of_pass(int64_t m, int64_t row_bytes, int64_t most) {
  const int64_t fit = kPassBytes / row_bytes;
  const int64_t passes = div_up(m, fit < 4 * kAmxRows ? 4 * kAmxRows : min_of(fit, most));
  return round_up(div_up(m, passes), kAmxRows);
}

// How the k of a tile are cut, in bytes of depth. A run is what one set of sums is over: two
// products, or a smaller group.
struct Runs {
  int64_t chunk;  // of one product
  int64_t run;
  int64_t group_shift;  // log2 of the runs of a group
  int64_t depth;        // of the tile
  int64_t count;
};

template <Kind kKind>
Runs runs_of(const LowbitGemmArgs& a, int64_t k) {
  Runs runs{kAmxBytes, 2 * kAmxBytes, 32, 0, 0};
  if (a.groups > 1) {
    const int64_t group = depth_of(kKind, a.group_size);
    runs.chunk = min_of(group, runs.chunk);
    runs.run = min_of(group, runs.run);
    runs.group_shift = group > runs.run ? 1 : 0;  // at most 128 bf16 are 256 bytes
  }
  runs.depth = min_of(kTileDepth, depth_of(kKind, round_up(a.k, kUnit) - k));
  runs.count = div_up(runs.depth, runs.run);
  return runs;
}

// 16 rows of x (of each digit) against one half of a tile.
struct HalfArgs {
  const Tile* tile;
  const Runs* runs;
  int64_t half;
  const uint8_t* x;       // the block's rows from the tile's first k on
  const int32_t* x_sums;  // of the block's first digit row and the tile's first group
  const float* x_scales;  // digits 3: alike
  int64_t rows;           // that exist
  int64_t groups;         // stride of both
  Block* blocks;          // one; where sums are kept, one a digit
};

// totals += scale * sums of one run, in group `group` of the tile.
template <Kind kKind, int kDigits>
OW_INLINE void add_run(const HalfArgs& h, int64_t group, const Block sums[kDigits],
                       VecF totals[kAmxRows]) {
  const VecF scale = load(h.tile->scales[group][h.half]);
  const __m512i zeros = _mm512_load_si512(h.tile->zeros[group][h.half]);
#pragma GCC unroll 16
  for (int r = 0; r < kAmxRows; ++r) {
    if constexpr (kKind == Kind::kBf16) {
      totals[r] = fma(load(sums[0].totals[r]), scale, totals[r]);
      continue;
    }
    __m512i digits[kDigits];
    // Rows past the last have neither sums nor scales; the last one's will do.
    const int64_t row = min_of(r, h.rows - 1);
    for (int d = 0; d < kDigits; ++d) {
      digits[d] = _mm512_load_si512(sums[d].sums[r]);
      if constexpr (kKind == Kind::kUnsigned) {
        const int32_t x_sum = h.x_sums[(row * kDigits + d) * h.groups + group];
        digits[d] =
            _mm512_sub_epi32(digits[d], _mm512_mullo_epi32(zeros, _mm512_set1_epi32(x_sum)));
      }
    }
    const float x_scale = kDigits == 3 ? h.x_scales[row * h.groups + group] : 1.0f;
    totals[r] = fma(group_sum<kDigits>(digits, 1, x_scale), scale, totals[r]);
  }
}

template <int kN>
struct Index {
  static constexpr int kValue = kN;
};

// Which tile registers hold what: sums from 0 on, then x, then lines.
template <int kDigits>
struct Registers {
  static constexpr int kSlots = kDigits == 3 ? 2 : 4;  // runs at a time
  static constexpr int kSums = kSlots * kDigits;
  static constexpr int kX = kDigits == 3 ? 1 : 2;
};

template <Kind kKind, int kDigits, int kSlot>
OW_INLINE void multiply_chunk(const HalfArgs& h, int64_t depth) {
  using R = Registers<kDigits>;
  constexpr int kX = R::kSums + kSlot % R::kX;
  constexpr int kLines = kX + R::kX;
  constexpr int64_t kStride = kAmxBytes * kDigits;
  tile_load<kLines>(h.tile->lines[h.half][depth / 4], 64);
  const uint8_t* x = h.x + depth / kAmxBytes * kStride * kAmxRows + depth % kAmxBytes;
  tile_load<kX>(x, kStride);
  tile_dot<kKind, kSlot * kDigits, kX, kLines>();
  if constexpr (kDigits == 3) {
    tile_load<kX>(x + kAmxBytes, kStride);
    tile_dot<kKind, kSlot * kDigits + 1, kX, kLines>();
    tile_load<kX>(x + 2 * kAmxBytes, kStride);
    tile_dot<kKind, kSlot * kDigits + 2, kX, kLines>();
  }
}

// The sums of the runs from `run` on, as many as there are slots, to `sums`.
template <Kind kKind, int kDigits>
OW_INLINE void multiply_runs(const HalfArgs& h, int64_t run, Block* sums) {
  using R = Registers<kDigits>;
  const Runs& runs = *h.runs;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  if constexpr (R::kSums > 4) tile_zero<4>(), tile_zero<5>();
  const auto slot = [&](auto index, int64_t at) __attribute__((always_inline)) {
    constexpr int kSlot = decltype(index)::kValue;
    const int64_t depth = (run + kSlot) * runs.run + at;
    if (depth < runs.depth) multiply_chunk<kKind, kDigits, kSlot>(h, depth);
  };
  for (int64_t at = 0; at < runs.run; at += runs.chunk) {
    slot(Index<0>{}, at), slot(Index<1>{}, at);
    if constexpr (R::kSlots == 4) slot(Index<2>{}, at), slot(Index<3>{}, at);
  }
  tile_store<0>(sums), tile_store<1>(sums + 1), tile_store<2>(sums + 2), tile_store<3>(sums + 3);
  if constexpr (R::kSums > 4) tile_store<4>(sums + 4), tile_store<5>(sums + 5);
}

// totals += x * half
template <Kind kKind, int kDigits>
__attribute__((noinline)) void multiply_half(const HalfArgs& h) {
  constexpr int kSlots = Registers<kDigits>::kSlots;
  Block sums[Registers<kDigits>::kSums];
  VecF totals[kAmxRows];
#pragma GCC unroll 16
  for (int r = 0; r < kAmxRows; ++r) totals[r] = load(h.blocks->totals[r]);
  for (int64_t run = 0; run < h.runs->count; run += kSlots) {
    multiply_runs<kKind, kDigits>(h, run, sums);
    for (int64_t i = 0; i < min_of(kSlots, h.runs->count - run); ++i) {
      const int64_t group = (run + i) >> h.runs->group_shift;
      add_run<kKind, kDigits>(h, group, sums + i * kDigits, totals);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kAmxRows; ++r) store(h.blocks->totals[r], totals[r]);
}

// sums += x * half, of each digit: of a group that may be longer than a tile.
template <Kind kKind, int kDigits>
__attribute__((noinline)) void sum_half(const HalfArgs& h) {
  constexpr int kSlots = Registers<kDigits>::kSlots;
  Block sums[Registers<kDigits>::kSums];
  for (int64_t run = 0; run < h.runs->count; run += kSlots) {
    multiply_runs<kKind, kDigits>(h, run, sums);
    for (int64_t i = 0; i < min_of(kSlots, h.runs->count - run) * kDigits; ++i) {
      Block& to = h.blocks[i % kDigits];
      for (int r = 0; r < kAmxRows; ++r) {
        const __m512i sum = _mm512_load_si512(sums[i].sums[r]);
        _mm512_store_si512(to.sums[r], _mm512_add_epi32(_mm512_load_si512(to.sums[r]), sum));
      }
    }
  }
}

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
void unpack_tile(const LowbitGemmArgs& a, int64_t panel, int64_t begin, int64_t end, Tile& tile) {
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
      store(tile.scales[in_tile][h], load_scales(a, at));
      _mm512_store_si512(tile.zeros[in_tile][h], zeros);
      unpack_group<kBits, kKind>(half, zeros, unit, group_end,
                                 tile.lines[h] + depth_of(kKind, (unit - begin) * kUnit) / 4);
      unit = group_end;
    }
  }
}

// y of `rows` rows. Sums that were kept become totals first.
template <Kind kKind, int kDigits, bool kKeepsSums>
void finish_blocks(const LowbitGemmArgs& a, const Tile& tile, int64_t panel, int64_t row_begin,
                   int64_t rows, Block* blocks) {
  for (int64_t h = 0; h < kTileHalves; ++h) {
    for (int64_t b = 0; b < rows; b += kAmxRows) {
      Block* block = blocks + (b / kAmxRows * kTileHalves + h) * kDigits;
      const int64_t row = row_begin + b;
      const int64_t count = min_of(kAmxRows, a.m - row);
      if constexpr (kKeepsSums) {
        const HalfArgs half{
            &tile, nullptr, h,    nullptr, a.x_sums + row * kDigits, a.x_scales + row,
            count, 1,       block};
        VecF totals[kAmxRows];
        for (VecF& total : totals) total = set1(0.0f);
        add_run<kKind, kDigits>(half, 0, block, totals);
        for (int r = 0; r < kAmxRows; ++r) store(block->totals[r], totals[r]);
      }
      for (int64_t r = 0; r < count; ++r) {
        finish(a, row + r, panel * kPanel + h * kHalf, block->totals[r]);
      }
    }
  }
}

template <int kBits, Kind kKind, int kDigits, bool kKeepsSums>
void tile_range(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kUnits = kTileDepth / depth_of(kKind, kUnit);
  using R = Registers<kDigits>;
  const int64_t row_units = div_up(a.k, kUnit);
  const int64_t row_bytes = a.x_blocks.k_padded * kDigits * (kKind == Kind::kBf16 ? 2 : 1);
  const int64_t pass_rows = rows_of_pass(a.m, row_bytes, kPassRows / kDigits);
  Tile tile = {};  // what lies past k is multiplied too, by zeros
  alignas(64) Block blocks[kPassRows / kAmxRows * kTileHalves];
  shape_tiles(runs_of<kKind>(a, 0).chunk, R::kSums, R::kX);
  for (int64_t row_begin = 0; row_begin < a.m; row_begin += pass_rows) {
    const int64_t rows = min_of(pass_rows, a.m - row_begin);
    const int64_t row_blocks = div_up(rows, kAmxRows);
    for (int64_t panel = begin; panel < end; ++panel) {
      memset(blocks, 0, size_t(row_blocks * kTileHalves * kDigits) * sizeof(Block));
      for (int64_t unit = 0; unit < row_units; unit += kUnits) {
        const int64_t unit_end = min_of(unit + kUnits, row_units);
        unpack_tile<kBits, kKind>(a, panel, unit, unit_end, tile);
        NextTile next = next_tile<1>(a, panel, end, unit_end, kUnits, row_blocks);
        const int64_t g = a.groups == 1 ? 0 : unit * kUnit / a.group_size;
        const Runs runs = runs_of<kKind>(a, unit * kUnit);
        for (int64_t b = 0; b < row_blocks; ++b) {
          next.fetch_share();
          const int64_t row = row_begin + b * kAmxRows;
          HalfArgs args{};
          args.tile = &tile;
          args.runs = &runs;
          args.x = static_cast<const uint8_t*>(a.x) + row * row_bytes +
                   depth_of(kKind, unit * kUnit) * kAmxRows * kDigits;
          if (kKind != Kind::kBf16) args.x_sums = a.x_sums + row * kDigits * a.groups + g;
          if (kDigits == 3) args.x_scales = a.x_scales + row * a.groups + g;
          args.rows = min_of(kAmxRows, a.m - row);
          args.groups = a.groups;
          for (args.half = 0; args.half < kTileHalves; ++args.half) {
            args.blocks = blocks + (b * kTileHalves + args.half) * kDigits;
            if constexpr (kKeepsSums) {
              sum_half<kKind, kDigits>(args);
            } else {
              multiply_half<kKind, kDigits>(args);
            }
          }
        }
      }
      finish_blocks<kKind, kDigits, kKeepsSums>(a, tile, panel, row_begin, rows, blocks);
    }
  }
  release_tiles();
}

template <int kBits, Kind kKind, int kDigits>
void tile_kind(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  // A group that is the row may be longer than a tile, and integers are added exactly.
  if (a.groups == 1) return tile_range<kBits, kKind, kDigits, true>(a, begin, end);
  tile_range<kBits, kKind, kDigits, false>(a, begin, end);
}

template <int kBits, int kDigits>
void tile_int8(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  // c - z of 8 bits takes 9, but for the fixed z of a symmetric weight.
  if constexpr (kBits == 8) {
    if (a.w_zeros != nullptr) return tile_kind<8, Kind::kUnsigned, kDigits>(a, begin, end);
  }
  tile_kind<kBits, Kind::kSigned, kDigits>(a, begin, end);
}

}  // namespace
}  // namespace avx512amx

void lowbit_gemm_tile_32x16_avx512amx(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  switch (a.bits * 4 + a.digits) {
    case 2 * 4 + 1: return avx512amx::tile_int8<2, 1>(a, begin, end);
    case 3 * 4 + 1: return avx512amx::tile_int8<3, 1>(a, begin, end);
    case 4 * 4 + 1: return avx512amx::tile_int8<4, 1>(a, begin, end);
    case 8 * 4 + 1: return avx512amx::tile_int8<8, 1>(a, begin, end);
    case 2 * 4 + 3: return avx512amx::tile_int8<2, 3>(a, begin, end);
    case 3 * 4 + 3: return avx512amx::tile_int8<3, 3>(a, begin, end);
    case 4 * 4 + 3: return avx512amx::tile_int8<4, 3>(a, begin, end);
    case 8 * 4 + 3: return avx512amx::tile_int8<8, 3>(a, begin, end);
  }
}

void lowbit_gemm_tile_32x16_bf16_avx512amx(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  using avx512amx::Kind;
  switch (a.bits) {
    case 2: return avx512amx::tile_range<2, Kind::kBf16, 1, false>(a, begin, end);
    case 3: return avx512amx::tile_range<3, Kind::kBf16, 1, false>(a, begin, end);
    case 4: return avx512amx::tile_range<4, Kind::kBf16, 1, false>(a, begin, end);
    case 8: return avx512amx::tile_range<8, Kind::kBf16, 1, false>(a, begin, end);
  }
}

}  // namespace ow
