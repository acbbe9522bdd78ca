// AMX kernels. A tile register holds 16 rows of 64 bytes, and one product adds to 16 x 16 sums
//
//   sums[16 rows of x, 16 outputs] += x[16 rows, 64 bytes of k] * lines[16 lines of 4 bytes of k]
//
// 64 k of int8, or 32 k of bf16. A line, 16 outputs x 4 bytes, is that of the packed layout; only
// its codes are unpacked. Codes become signed c - z where that fits a byte, and x needs no sums.
//
// A product takes 16 cycles and its sums are ready after 52, so four runs of k are kept going, each
// in a register of its own. Where a run ends its sums are stored, the next one is started in the
// register, and only then are the sums scaled and added to float totals: vectors work while tiles
// multiply, from one half and one block of rows to the next without a stop. (Storing four runs
// before adding up four: half as long again.) One group a row: integers, added in the registers.
//
// Measured on one core in loops of their own, of the peak: products with loads of operands from L1
// 73 %, with stores 73 %, with totals 55 % (int8) and 65 to 70 % (bf16). No gain there: fetching x
// to L1, one load of x for both halves, 2 x 2 blocks of registers, totals in memory.
#include "kernels/lowbit_gemm/lowbit_gemm_avx512amx_tile.h"

namespace ow {
namespace avx512amx {
namespace {

// k that are added up in one tile register: a group, or a piece of one that is the row.
constexpr int64_t kRunK = 128;
// Digit rows of x that share an unpacked tile, at most; and their bytes, of an L2 cache of 2 MiB
// (1.5 MiB: no faster, 2 MiB: a fifth slower).
constexpr int64_t kPassRows = 528;
constexpr int64_t kPassBytes = 1 << 20;

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

// How the k of a tile are cut, in bytes of depth. A run is what one set of sums is over.
struct Runs {
  int64_t chunk;  // of one product
  int64_t run;
  int64_t depth;  // of the tile
  int64_t count;
};

template <Kind kKind>
Runs runs_of(const LowbitGemmArgs& a, int64_t k) {
  Runs runs{};
  runs.run = depth_of(kKind, a.groups > 1 ? a.group_size : kRunK);
  runs.chunk = min_of(runs.run, kAmxBytes);
  runs.depth = depth_of(kKind, min_of(kTileK, round_up(a.k, kUnit) - k));
  runs.count = div_up(runs.depth, runs.run);
  return runs;
}

// 16 rows of x (of each digit) against one half of a tile.
struct HalfArgs {
  const uint8_t (*lines)[64];  // of the half
  const Grid* grid;
  Runs runs;
  int64_t half;
  const uint8_t* x;       // the block's rows from the tile's first k on
  const int32_t* x_sums;  // of the block's first digit row and the tile's first group
  const float* x_scales;  // digits 3: alike
  int64_t rows;           // that exist
  int64_t groups;         // of a row of x
  Block* blocks;          // its totals; or the parts of its sums
};

// totals += scale * sums of one run, in group `group` of the tile.
template <Kind kKind, int kDigits>
OW_INLINE void add_run(const HalfArgs& h, int64_t group, const Block sums[kDigits],
                       VecF totals[kAmxRows]) {
  const VecF scale = load(h.grid->scales[group][h.half]);
  const __m512i zeros = _mm512_load_si512(h.grid->zeros[group][h.half]);
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
  tile_load<kLines>(h.lines[depth / 4], 64);
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

// Stores the sums of a slot and starts run `run` of `h` in it, if there is one.
template <Kind kKind, int kDigits, int kSlot>
OW_INLINE void next_run(const HalfArgs& h, int64_t run, Block* sums) {
  constexpr int kSums = kSlot * kDigits;
  tile_store<kSums>(sums);
  tile_zero<kSums>();
  if constexpr (kDigits == 3) {
    tile_store<kSums + 1>(sums + 1), tile_store<kSums + 2>(sums + 2);
    tile_zero<kSums + 1>(), tile_zero<kSums + 2>();
  }
  const int64_t begin = run * h.runs.run;
  const int64_t end = min_of(begin + h.runs.run, h.runs.depth);
  for (int64_t at = begin; at < end; at += h.runs.chunk) {
    multiply_chunk<kKind, kDigits, kSlot>(h, at);
  }
}

// The first run of the last round of a half.
template <int kSlots>
OW_INLINE int64_t last_round(const HalfArgs& h) {
  return h.runs.count == 0 ? 0 : (h.runs.count - 1) / kSlots * kSlots;
}

// totals += x * half, in turns with the half before: the last runs of `before` are in the slots,
// and those of `now` will be.
template <Kind kKind, int kDigits>
__attribute__((noinline)) void multiply_half(const HalfArgs& now, const HalfArgs& before) {
  constexpr int kSlots = Registers<kDigits>::kSlots;
  Block sums[kSlots][kDigits];
  VecF totals[kAmxRows];
  const auto round = [&](int64_t run, const HalfArgs& h,
                         int64_t done) __attribute__((always_inline)) {
    const auto slot = [&](auto index) __attribute__((always_inline)) {
      constexpr int kSlot = decltype(index)::kValue;
      next_run<kKind, kDigits, kSlot>(now, run + kSlot, sums[kSlot]);
      if (done + kSlot < h.runs.count) {
        add_run<kKind, kDigits>(h, h.groups == 1 ? 0 : done + kSlot, sums[kSlot], totals);
      }
    };
    slot(Index<0>{}), slot(Index<1>{});
    if constexpr (kSlots == 4) slot(Index<2>{}), slot(Index<3>{});
  };
#pragma GCC unroll 16
  for (int r = 0; r < kAmxRows; ++r) totals[r] = load(before.blocks->totals[r]);
  round(0, before, last_round<kSlots>(before));
#pragma GCC unroll 16
  for (int r = 0; r < kAmxRows; ++r) store(before.blocks->totals[r], totals[r]);
  if (now.runs.count <= kSlots) return;
#pragma GCC unroll 16
  for (int r = 0; r < kAmxRows; ++r) totals[r] = load(now.blocks->totals[r]);
  for (int64_t run = kSlots; run < now.runs.count; run += kSlots) round(run, now, run - kSlots);
#pragma GCC unroll 16
  for (int r = 0; r < kAmxRows; ++r) store(now.blocks->totals[r], totals[r]);
}

// Where one group is the row: sums += x * half. Those of one digit are kept in two parts of
// alternate chunks, for products of one part wait for each other.
template <int kDigits>
constexpr int kParts = kDigits == 3 ? 3 : 2;

template <Kind kKind>
OW_INLINE void sum_chunks(const HalfArgs& h) {
  constexpr int64_t kX = kAmxRows * kAmxBytes;
  const uint8_t(*next)[64] = h.lines + sizeof(Tile<kKind>::lines[0]) / 64;
  const auto chunk = [&](auto part, int64_t depth) __attribute__((always_inline)) {
    constexpr int kPart = decltype(part)::kValue;
    tile_load<4 + kPart>(h.x + depth / kAmxBytes * kX, kAmxBytes);
    tile_load<6>(h.lines[depth / 4], 64);
    tile_dot<kKind, kPart, 4 + kPart, 6>();
    tile_load<7>(next[depth / 4], 64);
    tile_dot<kKind, 2 + kPart, 4 + kPart, 7>();
  };
  tile_load<0>(h.blocks, 64), tile_load<1>(h.blocks + 1, 64);
  tile_load<2>(h.blocks + 2, 64), tile_load<3>(h.blocks + 3, 64);
  for (int64_t depth = 0; depth < h.runs.depth; depth += 2 * kAmxBytes) {
    chunk(Index<0>{}, depth);
    if (depth + kAmxBytes < h.runs.depth) chunk(Index<1>{}, depth + kAmxBytes);
  }
  tile_store<0>(h.blocks), tile_store<1>(h.blocks + 1), tile_store<2>(h.blocks + 2);
  tile_store<3>(h.blocks + 3);
}

template <Kind kKind>
OW_INLINE void sum_digits(const HalfArgs& h) {
  constexpr int64_t kX = kAmxRows * kAmxBytes * 3;
  tile_load<0>(h.blocks, 64), tile_load<1>(h.blocks + 1, 64), tile_load<2>(h.blocks + 2, 64);
  for (int64_t depth = 0; depth < h.runs.depth; depth += kAmxBytes) {
    const uint8_t* x = h.x + depth / kAmxBytes * kX;
    tile_load<7>(h.lines[depth / 4], 64);
    tile_load<6>(x, 3 * kAmxBytes);
    tile_dot<kKind, 0, 6, 7>();
    tile_load<6>(x + kAmxBytes, 3 * kAmxBytes);
    tile_dot<kKind, 1, 6, 7>();
    tile_load<6>(x + 2 * kAmxBytes, 3 * kAmxBytes);
    tile_dot<kKind, 2, 6, 7>();
  }
  tile_store<0>(h.blocks), tile_store<1>(h.blocks + 1), tile_store<2>(h.blocks + 2);
}

// Totals of the sums of one half of a block: one group, whose grid is `grid`.
template <Kind kKind, int kDigits>
void sums_to_totals(const LowbitGemmArgs& a, const Grid& grid, int64_t half, int64_t row,
                    Block* parts) {
  HalfArgs h{};
  h.grid = &grid;
  h.half = half;
  h.x_sums = a.x_sums + row * kDigits;
  h.x_scales = a.x_scales + row;
  h.rows = min_of(kAmxRows, a.m - row);
  h.groups = 1;
  VecF totals[kAmxRows];
  for (int r = 0; r < kAmxRows; ++r) {
    totals[r] = set1(0.0f);
    if (kDigits == 1) {
      const __m512i even = _mm512_load_si512(parts[0].sums[r]);
      const __m512i odd = _mm512_load_si512(parts[1].sums[r]);
      _mm512_store_si512(parts[0].sums[r], _mm512_add_epi32(even, odd));
    }
  }
  add_run<kKind, kDigits>(h, 0, parts, totals);
  for (int r = 0; r < kAmxRows; ++r) store(parts->totals[r], totals[r]);
}

// y of the 16 rows from `row` on, from their totals (their sums, where those are kept).
template <Kind kKind, int kDigits, bool kKeepsSums>
void finish_block(const LowbitGemmArgs& a, const Grid& grid, int64_t panel, int64_t row,
                  Block* block) {
  constexpr int64_t kBlocks = kKeepsSums ? kParts<kDigits> : 1;
  if constexpr (kKeepsSums) {
    for (int64_t h = 0; h < kTileHalves; ++h) {
      sums_to_totals<kKind, kDigits>(a, grid, h, row, block + h * kBlocks);
    }
  }
  for (int64_t r = 0; r < min_of(kAmxRows, a.m - row); ++r) {
    for (int64_t h = 0; h < kTileHalves; ++h) {
      finish(a, row + r, panel * kPanel + h * kHalf, block[h * kBlocks].totals[r]);
    }
  }
}

// Units from `unit` on against rows from `row` on; the half and its blocks are left open.
template <Kind kKind, int kDigits>
OW_INLINE void place_half(const LowbitGemmArgs& a, const Grid& grid, int64_t unit, int64_t row,
                          HalfArgs& h) {
  const int64_t row_bytes = depth_of(kKind, a.x_blocks.k_padded) * kDigits;
  const int64_t g = a.groups == 1 ? 0 : unit * kUnit / a.group_size;
  h.grid = &grid;
  h.runs = runs_of<kKind>(a, unit * kUnit);
  h.x = static_cast<const uint8_t*>(a.x) + row * row_bytes +
        depth_of(kKind, unit * kUnit) * kAmxRows * kDigits;
  if (kKind != Kind::kBf16) h.x_sums = a.x_sums + row * kDigits * a.groups + g;
  if (kDigits == 3) h.x_scales = a.x_scales + row * a.groups + g;
  h.rows = min_of(kAmxRows, a.m - row);
  h.groups = a.groups;
}

// One panel of `rows` rows.
template <int kBits, Kind kKind, int kDigits, bool kKeepsSums>
void tile_panel(const LowbitGemmArgs& a, int64_t panel, int64_t end, int64_t row_begin,
                int64_t rows, Tile<kKind>& tile, Block* blocks) {
  constexpr int64_t kUnits = kTileK / kUnit;
  constexpr int64_t kBlocks = kKeepsSums ? kParts<kDigits> : 1;
  const int64_t row_units = div_up(a.k, kUnit);
  const int64_t row_blocks = div_up(rows, kAmxRows);
  Grid grids[2];  // of this tile and of the one before, whose last sums are still to be scaled
  memset(blocks, 0, size_t(row_blocks * kTileHalves * kBlocks) * sizeof(Block));
  // Two in turns, for a copy of one just written would wait for its stores.
  HalfArgs halves[2] = {};
  halves[1].blocks = blocks;
  for (int64_t unit = 0; unit < row_units; unit += kUnits) {
    const int64_t unit_end = min_of(unit + kUnits, row_units);
    Grid& grid = grids[unit / kUnits % 2];
    const bool last = unit_end == row_units;
    if (last) fetch_y(a, panel, row_begin);
    unpack_tile<kBits, kKind>(a, panel, unit, unit_end, tile, grid);
    NextTile next = next_tile<1>(a, panel, end, unit_end, kUnits, row_blocks);
    fetch_grid(a, panel, end, unit_end);
    const auto finish_at = [&](int64_t b) {
      finish_block<kKind, kDigits, kKeepsSums>(a, grid, panel, row_begin + b * kAmxRows,
                                               blocks + b * kTileHalves * kBlocks);
    };
    for (int64_t b = 0; b < row_blocks; ++b) {
      next.fetch_share();
      if (last && b + 1 < row_blocks) fetch_y(a, panel, row_begin + (b + 1) * kAmxRows);
      for (int64_t half = 0; half < kTileHalves; ++half) {
        HalfArgs& now = halves[half];
        place_half<kKind, kDigits>(a, grid, unit, row_begin + b * kAmxRows, now);
        now.half = half;
        now.lines = tile.lines[half];
        now.blocks = blocks + (b * kTileHalves + half) * kBlocks;
        if constexpr (kKeepsSums) {
          if (kDigits == 3) sum_digits<kKind>(now);
          if (kDigits == 1 && half == 0) sum_chunks<kKind>(now);
        } else {
          multiply_half<kKind, kDigits>(now, halves[1 - half]);
          if (last && b > 0 && half == 0) finish_at(b - 1);
        }
      }
      if (kKeepsSums && last) finish_at(b);
    }
    if (!kKeepsSums && last) {
      multiply_half<kKind, kDigits>(HalfArgs{}, halves[1]);
      finish_at(row_blocks - 1);
    }
  }
}

template <int kBits, Kind kKind, int kDigits, bool kKeepsSums>
void tile_range(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  using R = Registers<kDigits>;
  const int64_t row_bytes = depth_of(kKind, a.x_blocks.k_padded) * kDigits;
  const int64_t pass_rows = rows_of_pass(a.m, row_bytes, kPassRows / kDigits);
  Tile<kKind> tile = {};  // what lies past k is multiplied too, by zeros
  alignas(64) Block blocks[kPassRows / kAmxRows * kTileHalves * (kKeepsSums ? 2 : 1)];
  shape_tiles(runs_of<kKind>(a, 0).chunk, R::kSums, R::kX);
  for (int64_t row_begin = 0; row_begin < a.m; row_begin += pass_rows) {
    const int64_t rows = min_of(pass_rows, a.m - row_begin);
    for (int64_t panel = begin; panel < end; ++panel) {
      tile_panel<kBits, kKind, kDigits, kKeepsSums>(a, panel, end, row_begin, rows, tile, blocks);
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
