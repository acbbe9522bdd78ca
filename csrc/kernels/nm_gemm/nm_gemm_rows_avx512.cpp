// Few rows of x: the M values of a block lie in a register and vpermps selects, for 16 outputs at
// once, the one that each of them stored a weight for. Bound by memory.
#include "kernels/nm_gemm/nm_gemm_avx512.h"

namespace ow {
namespace avx512 {
namespace {

// Rows of x that share a decoded weight; more would only save decoding, which is not the limit.
constexpr int64_t kMaxRows = 4;

// The columns of a block of x. The upper bits of an index are ignored where the block repeats.
template <int kBlock>
struct Columns {
  __m512 low, high;

  explicit Columns(const float* x) {
    if constexpr (kBlock == 4) {
      low = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
    } else if constexpr (kBlock == 8) {
      low = _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
    } else {
      low = _mm512_loadu_ps(x);
    }
    if constexpr (kBlock == 32) high = _mm512_loadu_ps(x + 16);
  }
  VecF select(__m512i index) const {
    if constexpr (kBlock == 32) return {_mm512_permutex2var_ps(low, index, high)};
    return {_mm512_permutexvar_ps(index, low)};
  }
};

// --- any pattern: a unit decoded to L1, then multiplied ------------------------------------------

template <int kBlock, int kRows>
void multiply_rows(const NmGemmArgs& a, int64_t panel, int64_t row) {
  // Two chains for the latency of FMA; decoding fills the rest.
  VecF acc[2][kRows];
  for (int r = 0; r < kRows; ++r) acc[0][r] = acc[1][r] = set1(0.0f);
  const int64_t stride = nm_columns(a);
  const float* x = static_cast<const float*>(a.laid) + row * stride;
  int64_t left = a.kept;  // slots of the block that x points at
  const DecodeFn decode = decoder_of<false>(a);
  Tile tile;
  const int64_t units = nm_units(a);
  for (int64_t unit = 0; unit < units; ++unit) {
    decode(a, panel, {unit, 0, kNmUnit}, 1, &tile);
    for (int64_t s = 0; s < kNmUnit; s += 2) {
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const __m512i index = _mm512_load_si512(tile.columns[s + c]);
        const VecF weight = load(tile.weights[s + c]);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          acc[c][r] = fma(Columns<kBlock>(x + r * stride).select(index), weight, acc[c][r]);
        }
        if (--left == 0) {
          left = a.kept;
          x += kBlock;
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float totals[kNmPanel];
    store(totals, add(acc[0][r], acc[1][r]));
    finish(a, row + r, panel * kNmPanel, totals);
  }
}

// --- 2:4 and 4:8: decoded in registers -----------------------------------------------------------
//
// The 16 slots of an index line select from 32 columns, which lie in one group.

constexpr int64_t kLineColumns = 32;

// The integers -8 .. 7 where their 4 bits say.
OW_INLINE __m512 nibble_table() {
  return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
}

// The stored numbers of slot kSlot, without their scales.
template <int kBits, int kSlot>
OW_INLINE VecF stored(const uint8_t* values) {
  if constexpr (kBits == 32) {
    return load(reinterpret_cast<const float*>(values) + kSlot * kNmPanel);
  } else {
    const __m512i line = _mm512_loadu_si512(values + kSlot * kBits / 32 * 64);
    if constexpr (kBits == 16) {
      const __m512i high = _mm512_set1_epi32(int(0xffff0000));
      return {_mm512_castsi512_ps(kSlot % 2 == 0 ? _mm512_slli_epi32(line, 16)
                                                 : _mm512_and_si512(line, high))};
    } else if constexpr (kBits == 8) {
      const __m512i top = _mm512_slli_epi32(line, 24 - kSlot % 4 * 8);
      return to_float(VecI{_mm512_srai_epi32(top, 24)});
    } else {
      const __m512i code = _mm512_srli_epi32(line, kSlot % 4 * 8 + kSlot / 4 % 2 * 4);
      return {_mm512_permutexvar_ps(code, nibble_table())};
    }
  }
}

// What slot kSlot of a unit selects from its block, given its index line and that of the high bits.
template <int kBlock, int kSlot>
OW_INLINE __m512i selected(__m512i low, __m512i high) {
  const __m512i field = _mm512_srli_epi32(low, kSlot % 4 * 8 + kSlot / 4 % 4 * 2);
  if constexpr (kBlock == 4) return field;
  constexpr int kDown = kSlot % 4 * 8 + kSlot / 4 - 2;  // of the high bit, to bit 2
  __m512i bit;
  if constexpr (kDown < 0) {
    bit = _mm512_slli_epi32(high, -kDown);
  } else {
    bit = _mm512_srli_epi32(high, kDown);
  }
  return _mm512_ternarylogic_epi32(field, _mm512_set1_epi32(3), bit, 0xe2);  // bits 0, 1 of field
}

// acc += the slots of index line kLine of a unit.
template <int kBlock, int kBits, int kRows, int kLine, int... kSlots>
OW_INLINE void multiply_line(const uint8_t* values, __m512i low, __m512i high, const float* x,
                             int64_t stride, VecF (*acc)[kRows]) {
  (
      [&]() __attribute__((always_inline)) {
        const VecF weight = stored<kBits, kSlots>(values);
        const __m512i lanes = selected<kBlock, kLine * 16 + kSlots>(low, high);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Columns<kBlock> columns(x + r * stride + kSlots / (kBlock / 2) * kBlock);
          acc[kSlots % 4][r] = fma(columns.select(lanes), weight, acc[kSlots % 4][r]);
        }
      }(),
      ...);
}

// The scales of one index line after another.
class LineScales {
 public:
  LineScales(const NmGemmArgs& a, int64_t panel)
      : a_(a), panel_(panel), left_(a.groups == 1 ? INT64_MAX : a.group_size / kLineColumns) {}
  VecF next() {
    const VecF scales = load_scales(a_, panel_, g_);
    if (--left_ == 0) {
      left_ = a_.group_size / kLineColumns;
      g_ = min_of(g_ + 1, a_.groups - 1);  // a line of padding may lie past the last group
    }
    return scales;
  }

 private:
  const NmGemmArgs& a_;
  int64_t panel_, left_;
  int64_t g_ = 0;
};

template <int kBlock, int kBits, int kRows>
void multiply_rows_half(const NmGemmArgs& a, int64_t panel, int64_t row) {
  const LaneSpread spread(a.vector);
  LineScales scales(a, panel);
  const int64_t stride = nm_columns(a);
  const float* x = static_cast<const float*>(a.laid) + row * stride;
  VecF total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = set1(0.0f);
  const uint8_t* index = nm_unit_index(a, panel, 0);
  const uint8_t* values = nm_unit_values(a, panel, 0);
  const int64_t units = nm_units(a);
  const auto add_line = [&]<int kLine>(__m512i high) __attribute__((always_inline)) {
    VecF acc[4][kRows];
    for (int c = 0; c < 4; ++c) {
      for (int r = 0; r < kRows; ++r) acc[c][r] = set1(0.0f);
    }
    multiply_line<kBlock, kBits, kRows, kLine, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                  15>(values, spread.line(index, kLine), high, x, stride, acc);
    const VecF scale = kBits <= 8 ? scales.next() : set1(1.0f);
    for (int r = 0; r < kRows; ++r) {
      const VecF sum = add(add(acc[0][r], acc[1][r]), add(acc[2][r], acc[3][r]));
      total[r] = kBits <= 8 ? fma(sum, scale, total[r]) : add(total[r], sum);
    }
    x += kLineColumns;
    values += 32 * kBits;
  };
  for (int64_t unit = 0; unit < units; ++unit) {
    const __m512i high = kBlock == 8 ? spread.line(index, 2) : _mm512_setzero_si512();
    add_line.template operator()<0>(high);
    add_line.template operator()<1>(high);
    index += nm_unit_index_bytes(kBlock, a.vector);
  }
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float totals[kNmPanel];
    store(totals, total[r]);
    finish(a, row + r, panel * kNmPanel, totals);
  }
}

// --- dispatch ------------------------------------------------------------------------------------

using RowsFn = void (*)(const NmGemmArgs&, int64_t panel, int64_t row);

template <int kBlock>
RowsFn any_pattern(int64_t rows) {
  constexpr RowsFn kBy[] = {multiply_rows<kBlock, 1>, multiply_rows<kBlock, 2>,
                            multiply_rows<kBlock, 3>, multiply_rows<kBlock, 4>};
  return kBy[rows - 1];
}
template <int kBlock, int kBits>
RowsFn half_of_bits(int64_t rows) {
  constexpr RowsFn kBy[] = {
      multiply_rows_half<kBlock, kBits, 1>, multiply_rows_half<kBlock, kBits, 2>,
      multiply_rows_half<kBlock, kBits, 3>, multiply_rows_half<kBlock, kBits, 4>};
  return kBy[rows - 1];
}
template <int kBlock>
RowsFn half_pattern(int32_t bits, int64_t rows) {
  switch (bits) {
    case 4: return half_of_bits<kBlock, 4>(rows);
    case 8: return half_of_bits<kBlock, 8>(rows);
    case 16: return half_of_bits<kBlock, 16>(rows);
    default: return half_of_bits<kBlock, 32>(rows);
  }
}

RowsFn rows_fn(const NmGemmArgs& a, int64_t rows) {
  if (a.block == 4 && a.kept == 2) return half_pattern<4>(a.bits, rows);
  if (a.block == 8 && a.kept == 4) return half_pattern<8>(a.bits, rows);
  switch (a.block) {
    case 4: return any_pattern<4>(rows);
    case 8: return any_pattern<8>(rows);
    case 16: return any_pattern<16>(rows);
    default: return any_pattern<32>(rows);
  }
}

void multiply(const NmGemmArgs& a, int64_t begin, int64_t end) {
  // Passes of equal size; later ones find the panel in the cache.
  const int64_t passes = div_up(a.m, kMaxRows);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t row = a.m * pass / passes;
      rows_fn(a, a.m * (pass + 1) / passes - row)(a, panel, row);
    }
  }
}

}  // namespace
}  // namespace avx512

const NmGemmKernels nm_gemm_rows_avx512 = {avx512::laid_row_bytes, 1, avx512::lay_out_rows,
                                           avx512::multiply};

}  // namespace ow
