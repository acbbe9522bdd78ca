// int8 rows of x. vpermb selects, for 16 outputs and 4 slots at once, the codes of x that they
// stored a weight for; vpdpbusd multiplies and adds them. Its unsigned operand is x + 128, and
// 128 times the sum of a group's weights, which costs one product for all rows, is subtracted.
#include "kernels/nm_gemm/nm_gemm_body.h"

namespace ow {
namespace avx512 {
namespace {

// Rows that share a decoded line: a line's weights, index and 8 sums fit the registers with room.
constexpr int64_t kMaxRows = 8;

// acc += four products a lane. gcc 12 copies the accumulator round the intrinsic.
OW_INLINE void dot4(__m512i& acc, __m512i unsigned_x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_x), "v"(w));
}

// The index lines of a panel, spread to one lane an output.
class IndexReader {
 public:
  IndexReader(const NmGemmArgs& a, int64_t panel)
      : index_(nm_unit_index(a, panel, 0)),
        unit_bytes_(nm_unit_index_bytes(a.block, a.vector)),
        line_bytes_(nm_index_lanes(a.vector) * 4),
        mask_(__mmask16((1u << nm_index_lanes(a.vector)) - 1)) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i lanes = _mm512_set1_epi32(int(nm_index_lanes(a.vector)));
    spread_ = _mm512_srli_epi32(_mm512_mullo_epi32(lane, lanes), 4);
  }

  __m512i line(int64_t unit, int64_t i) const {
    const uint8_t* at = index_ + unit * unit_bytes_ + i * line_bytes_;
    return _mm512_permutexvar_epi32(spread_, _mm512_maskz_loadu_epi32(mask_, at));
  }

  // The indices of four slots, the q-th of the unit, one a byte.
  template <int kBlock>
  __m512i quad(int64_t unit, uint32_t q) const {
    constexpr int kLow = kBlock <= 8 ? 2 : 4;
    constexpr uint32_t kQuads = 8 / kLow;  // of a line
    const __m128i shift = _mm_cvtsi64_si128(q % kQuads * kLow);
    const __m512i low = _mm512_and_si512(_mm512_srl_epi16(line(unit, q / kQuads), shift),
                                         _mm512_set1_epi8((1 << kLow) - 1));
    if constexpr (kBlock == 4 || kBlock == 16) return low;
    const __mmask64 high = _mm512_test_epi8_mask(line(unit, kLow), _mm512_set1_epi8(char(1 << q)));
    return _mm512_mask_add_epi8(low, high, low, _mm512_set1_epi8(1 << kLow));
  }

 private:
  const uint8_t* index_;
  int64_t unit_bytes_, line_bytes_;
  __mmask16 mask_;
  __m512i spread_;
};

// The weights of four slots, the q-th of the row, one a byte; int4 ones are 16 times too large,
// which their scale makes up for.
template <int kBits>
OW_INLINE __m512i weights_of(const uint8_t* values, int64_t q) {
  if constexpr (kBits == 8) return _mm512_loadu_si512(values + q * 64);
  const __m512i line = _mm512_loadu_si512(values + q / 2 * 64);
  const __m512i top = q % 2 == 0 ? _mm512_slli_epi16(line, 4) : line;
  return _mm512_and_si512(top, _mm512_set1_epi8(char(0xf0)));
}

// Sums of one group.
template <int kRows>
struct Sums {
  __m512i x[kRows][2], w;  // two chains for the latency of vpdpbusd

  Sums() {
    w = _mm512_setzero_si512();
    for (int r = 0; r < kRows; ++r) x[r][0] = x[r][1] = _mm512_setzero_si512();
  }
  void add_weights(__m512i weights) { dot4(w, _mm512_set1_epi8(char(128)), weights); }
  VecF of_row(int r) const {
    const __m512i sum = _mm512_add_epi32(x[r][0], x[r][1]);
    return to_float(VecI{_mm512_sub_epi32(sum, w)});
  }
};

// --- any pattern ---------------------------------------------------------------------------------

// Where the codes of x for four slots are: those of a line's slots lie within 64 columns from that
// of its first slot's block on. Repeats every `kept` lines, which are four blocks.
struct Quads {
  int64_t column[32];
  uint32_t offset[32];  // of each slot's block from the first one's

  explicit Quads(const NmGemmArgs& a) {
    for (int64_t q = 0; q < a.kept; ++q) {
      column[q] = 4 * q / a.kept * a.block;
      offset[q] = 0;
      for (int64_t b = 0; b < 4; ++b) {
        const int64_t from_first = (4 * q + b) / a.kept * a.block - column[q];
        offset[q] |= uint32_t(from_first) << (8 * b);
      }
    }
  }
};

// Lines [begin, end) of four slots.
template <int kBits, int kBlock, int kRows>
OW_INLINE void add_lines(const NmGemmArgs& a, const uint8_t* values, const IndexReader& index,
                         const Quads& quads, const uint8_t* x, int64_t stride, int64_t begin,
                         int64_t end, Sums<kRows>* sums) {
  int64_t period = begin / a.kept;
  int64_t of_period = begin % a.kept;
  for (int64_t q = begin; q < end; ++q) {
    const __m512i w = weights_of<kBits>(values, q);
    sums->add_weights(w);
    const __m512i select = _mm512_add_epi8(index.quad<kBlock>(q / 8, uint32_t(q) % 8),
                                           _mm512_set1_epi32(int(quads.offset[of_period])));
    const uint8_t* from = x + period * 4 * kBlock + quads.column[of_period];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i codes = _mm512_loadu_si512(from + r * stride);
      dot4(sums->x[r][0], _mm512_permutexvar_epi8(select, codes), w);
    }
    if (++of_period == a.kept) {
      of_period = 0;
      ++period;
    }
  }
}

// --- 2:4 -----------------------------------------------------------------------------------------

// Index lines [begin, end): of 16 slots each, 32 columns. The 8 codes that a line of values selects
// from are one broadcast.
template <int kBits, int kRows>
OW_INLINE void add_lines_2_4(const uint8_t* values, const IndexReader& index, const uint8_t* x,
                             int64_t stride, int64_t begin, int64_t end, Sums<kRows>* sums) {
  const __m512i field = _mm512_set1_epi8(3);
  const __m512i second_block = _mm512_set1_epi32(0x04040000);
  for (int64_t line = begin; line < end; ++line) {
    const __m512i lanes = index.line(line / 2, line % 2);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m512i w = weights_of<kBits>(values, line * 4 + q);
      sums->add_weights(w);
      // (lanes >> 2 q & 3) | second_block
      const __m512i select = _mm512_ternarylogic_epi64(_mm512_srli_epi16(lanes, unsigned(2 * q)),
                                                       field, second_block, 0xea);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        long long eight;
        memcpy(&eight, x + r * stride + line * 32 + q * 8, 8);
        const __m512i codes = _mm512_set1_epi64(eight);
        dot4(sums->x[r][q % 2], _mm512_permutexvar_epi8(select, codes), w);
      }
    }
  }
}

// --- a panel -------------------------------------------------------------------------------------

template <int kBits, int kBlock, bool kTwoOfFour, int kRows>
void multiply_rows(const NmGemmArgs& a, int64_t panel, int64_t row) {
  constexpr int64_t kStep = kTwoOfFour ? 16 : 4;  // slots that `begin` and `end` below count
  const IndexReader index(a, panel);
  const Quads quads(a);
  const uint8_t* values = nm_unit_values(a, panel, 0);
  const uint8_t* x = laid_codes(a, row);
  const int64_t stride = code_stride(a);
  const int64_t steps = div_up(nm_slots(a.k, a.kept, a.block), kStep);
  const int64_t group_steps = a.groups == 1 ? steps : a.group_size / a.block * a.kept / kStep;
  const VecF unit = set1(kBits == 4 ? 1.0f / 16 : 1.0f);
  VecF totals[kRows];
  for (int r = 0; r < kRows; ++r) totals[r] = set1(0.0f);
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t begin = g * group_steps;
    const int64_t end = min_of(begin + group_steps, steps);
    Sums<kRows> sums;
    if constexpr (kTwoOfFour) {
      add_lines_2_4<kBits, kRows>(values, index, x, stride, begin, end, &sums);
    } else {
      add_lines<kBits, kBlock, kRows>(a, values, index, quads, x, stride, begin, end, &sums);
    }
    const VecF scale = mul(load_scales(a, panel, g), unit);
    for (int r = 0; r < kRows; ++r) totals[r] = fma(sums.of_row(r), scale, totals[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float y[kNmPanel];
    store(y, mul(totals[r], set1(a.x_scales[row + r])));
    finish(a, row + r, panel * kNmPanel, y);
  }
}

template <int kBits, int kBlock, bool kTwoOfFour>
void multiply_range(const NmGemmArgs& a, int64_t begin, int64_t end) {
  using RowsFn = void (*)(const NmGemmArgs&, int64_t panel, int64_t row);
  constexpr RowsFn kBy[] = {
      multiply_rows<kBits, kBlock, kTwoOfFour, 1>, multiply_rows<kBits, kBlock, kTwoOfFour, 2>,
      multiply_rows<kBits, kBlock, kTwoOfFour, 3>, multiply_rows<kBits, kBlock, kTwoOfFour, 4>,
      multiply_rows<kBits, kBlock, kTwoOfFour, 5>, multiply_rows<kBits, kBlock, kTwoOfFour, 6>,
      multiply_rows<kBits, kBlock, kTwoOfFour, 7>, multiply_rows<kBits, kBlock, kTwoOfFour, 8>};
  // Passes of equal size: 9 rows cost 5 + 4, not 8 + 1. Later passes find the panel in L2.
  const int64_t passes = div_up(a.m, kMaxRows);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t row = a.m * pass / passes;
      kBy[a.m * (pass + 1) / passes - row - 1](a, panel, row);
    }
  }
}

template <int kBits>
void multiply_bits(const NmGemmArgs& a, int64_t begin, int64_t end) {
  switch (a.block) {
    case 4:
      return a.kept == 2 ? multiply_range<kBits, 4, true>(a, begin, end)
                         : multiply_range<kBits, 4, false>(a, begin, end);
    case 8: return multiply_range<kBits, 8, false>(a, begin, end);
    case 16: return multiply_range<kBits, 16, false>(a, begin, end);
    default: return multiply_range<kBits, 32, false>(a, begin, end);
  }
}

void multiply_int8(const NmGemmArgs& a, int64_t begin, int64_t end) {
  return a.bits == 4 ? multiply_bits<4>(a, begin, end) : multiply_bits<8>(a, begin, end);
}

}  // namespace
}  // namespace avx512

const NmGemmKernels nm_gemm_int8_avx512 = {avx512::laid_row_bytes, 1, avx512::lay_out_rows,
                                           avx512::multiply_int8};

}  // namespace ow
