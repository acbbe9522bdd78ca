// int8 rows of x. vpermb selects, for 16 outputs and 4 slots at once, the codes of x that they
// stored a weight for; vpdpbusd multiplies and adds them. Its unsigned operand is x + 128, and
// 128 times the sum of a group's weights, which costs one product for all rows, is subtracted.
#include "kernels/nm_gemm/nm_gemm_avx512.h"

namespace ow {
namespace avx512 {
namespace {

// Columns that four slots select from, if those are the next 8 or 16 for every four slots: so they
// are for 2:4, 4:8, 1:4, 2:8, 4:16 and 8:16. Otherwise 0.
OW_INLINE int64_t window_of(const NmGemmArgs& a) {
  const bool whole = (a.kept & (a.kept - 1)) == 0;
  const int64_t window = a.kept <= 4 ? 4 / a.kept * a.block : a.block;
  return whole && window <= 16 ? window : 0;
}

// Rows that share a decoded line, a pass: their sums, a line's weights and its index fit the
// registers. Without windows 64 codes of each row are read at a time: more rows gain nothing.
constexpr int most_rows(int64_t window) { return window > 0 ? 16 : 8; }

// Passes of equal size: 17 rows cost 9 + 8, not 16 + 1. Later ones find the panel in L2.
struct Passes {
  int64_t m, count;

  explicit Passes(const NmGemmArgs& a) : m(a.m), count(div_up(a.m, most_rows(window_of(a)))) {}
  int64_t begin(int64_t pass) const { return m * pass / count; }
  int64_t rows(int64_t pass) const { return begin(pass + 1) - begin(pass); }
  int64_t of_row(int64_t row) const { return div_up((row + 1) * count, m) - 1; }
};

// --- x in windows --------------------------------------------------------------------------------
//
// Of each pass [columns / window, rows, window], so that one stream is read. Codes + 128, as in
// rows.

OW_INLINE const uint8_t* laid_pass(const NmGemmArgs& a, int64_t row) {
  return static_cast<const uint8_t*>(a.laid) + row * nm_columns(a);
}

// Rows [begin, end), all of one pass, which starts at row `first`.
template <int kWindow>
void lay_out_pass(const NmGemmArgs& a, int64_t begin, int64_t end, int64_t first, int64_t rows) {
  const int8_t* x = static_cast<const int8_t*>(a.x);
  uint8_t* out = static_cast<uint8_t*>(a.laid) + first * nm_columns(a);
  for (int64_t k = 0; k < nm_columns(a); k += 64) {
    const __mmask64 mask = k + 64 <= a.k ? ~0ull : k < a.k ? (1ull << (a.k - k)) - 1 : 0;
    for (int64_t row = begin; row < end; ++row) {
      alignas(64) uint8_t codes[64];
      _mm512_store_si512(codes, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x + row * a.k + k),
                                                 _mm512_set1_epi8(char(128))));
      uint8_t* to = out + k * rows + (row - first) * kWindow;
      for (int64_t i = 0; i < 64; i += kWindow) memcpy(to + i * rows, codes + i, kWindow);
    }
  }
}

int64_t laid_int8_bytes(const NmGemmArgs& a) {
  return window_of(a) > 0 ? a.m * nm_columns(a) : laid_row_bytes(a);
}

void lay_out_int8(const NmGemmArgs& a, int64_t begin, int64_t end) {
  const int64_t window = window_of(a);
  if (window == 0) return lay_out_rows(a, begin, end);
  const Passes passes(a);
  for (int64_t row = begin; row < end;) {
    const int64_t pass = passes.of_row(row);
    const int64_t last = min_of(passes.begin(pass + 1), end);
    const auto lay_out = window == 8 ? lay_out_pass<8> : lay_out_pass<16>;
    lay_out(a, row, last, passes.begin(pass), passes.rows(pass));
    row = last;
  }
}

// --- decoding ------------------------------------------------------------------------------------

// acc += four products a lane. gcc 12 copies the accumulator round the intrinsic.
OW_INLINE void dot4(__m512i& acc, __m512i unsigned_x, __m512i w) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_x), "v"(w));
}

// The index lines of a panel.
class IndexReader {
 public:
  IndexReader(const NmGemmArgs& a, int64_t panel)
      : spread_(a.vector),
        index_(nm_unit_index(a, panel, 0)),
        unit_bytes_(nm_unit_index_bytes(a.block, a.vector)) {}

  __m512i line(int64_t unit, int64_t i) const {
    return spread_.line(index_ + unit * unit_bytes_, i);
  }

  void fetch(int64_t unit) const {
    _mm_prefetch(index_ + unit * unit_bytes_, _MM_HINT_T0);
    _mm_prefetch(index_ + unit * unit_bytes_ + 64, _MM_HINT_T0);
  }

 private:
  LaneSpread spread_;
  const uint8_t* index_;
  int64_t unit_bytes_;
};

// (a & mask) | b, mask for each byte.
OW_INLINE __m512i or_field(__m512i a, int mask, __m512i b) {
  return _mm512_ternarylogic_epi64(a, _mm512_set1_epi8(char(mask)), b, 0xea);
}

// The indices of four slots after another, those of an index line.
template <int kBlock>
class LineIndices {
 public:
  static constexpr int kCount = kBlock <= 8 ? 4 : 2;

  // From the q-th four slots of the row on.
  __attribute__((always_inline)) LineIndices(const IndexReader& index, int64_t q) {
    const int64_t unit = q / 8;
    const __m128i begin = _mm_cvtsi64_si128(q % kCount * kLow);
    low_ = _mm512_srl_epi16(index.line(unit, q % 8 / kCount), begin);
    if constexpr (kHigh) {  // of each byte, bit q % 8 becomes bit kLow: turned right
      const __m512i high = index.line(unit, kLow);
      high_ = _mm512_shrdv_epi16(high, high, _mm512_set1_epi16(int16_t(q % 8 - kLow)));
    }
  }
  // Or `with`, one a byte.
  __attribute__((always_inline)) __m512i get(__m512i with) const {
    const __m512i low = or_field(low_, (1 << kLow) - 1, with);
    if constexpr (kHigh) return or_field(high_, 1 << kLow, low);
    return low;
  }
  __attribute__((always_inline)) void next() {
    low_ = _mm512_srli_epi16(low_, kLow);
    if constexpr (kHigh) high_ = _mm512_srli_epi16(high_, 1);
  }

 private:
  static constexpr int kLow = kBlock <= 8 ? 2 : 4;
  static constexpr bool kHigh = kBlock == 8 || kBlock == 32;

  __m512i low_, high_;
};

// Calls body<count>(q) for lines [begin, end) of four slots: for all that an index line describes
// at once, and one by one where it describes others, too.
template <int kBlock, class Body>
OW_INLINE void in_index_lines(int64_t begin, int64_t end, const Body& body) {
  constexpr int kCount = LineIndices<kBlock>::kCount;
  for (int64_t q = begin; q < end;) {
    if (q % kCount == 0 && end - q >= kCount) {
      body.template operator()<kCount>(q / kCount * kCount);  // the compiler sees no remainder
      q += kCount;
    } else {
      body.template operator()<1>(q);
      ++q;
    }
  }
}

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
  static constexpr int kChains = kRows <= 8 ? 2 : 1;  // for the latency of vpdpbusd
  __m512i x[kRows][kChains], w;

  Sums() {
    w = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) x[r][c] = _mm512_setzero_si512();
    }
  }
  void add_weights(__m512i weights) { dot4(w, _mm512_set1_epi8(char(128)), weights); }
  VecF of_row(int r) const {
    const __m512i sum = kChains == 1 ? x[r][0] : _mm512_add_epi32(x[r][0], x[r][kChains - 1]);
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

// Where the codes for the next line of four slots are.
struct NextQuad {
  const Quads& quads;
  const uint8_t* x;  // of the period's first column
  int64_t period_columns, kept, of_period;

  void advance() {
    if (++of_period < kept) return;
    of_period = 0;
    x += period_columns;
  }
};

// kCount lines of four slots from line q on, of one index line.
template <int kBits, int kBlock, int kCount, int kRows>
OW_INLINE void add_quads(const uint8_t* values, const IndexReader& index, int64_t stride, int64_t q,
                         NextQuad* next, Sums<kRows>* sums) {
  LineIndices<kBlock> indices(index, q);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i, indices.next(), next->advance()) {
    const __m512i w = weights_of<kBits>(values, q + i);
    sums->add_weights(w);
    const int64_t at = next->of_period;
    const __m512i select = indices.get(_mm512_set1_epi32(int(next->quads.offset[at])));
    const uint8_t* from = next->x + next->quads.column[at];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i codes = _mm512_loadu_si512(from + r * stride);
      dot4(sums->x[r][i % Sums<kRows>::kChains], _mm512_permutexvar_epi8(select, codes), w);
    }
  }
}

// Lines [begin, end) of four slots.
template <int kBits, int kBlock, int kRows>
OW_INLINE void add_lines(const NmGemmArgs& a, const uint8_t* values, const IndexReader& index,
                         const Quads& quads, const uint8_t* x, int64_t begin, int64_t end,
                         Sums<kRows>* sums) {
  const int64_t columns = 4 * kBlock;
  NextQuad next{quads, x + begin / a.kept * columns, columns, a.kept, begin % a.kept};
  const int64_t stride = code_stride(a);
  in_index_lines<kBlock>(begin, end, [&]<int kCount>(int64_t q) __attribute__((always_inline)) {
    add_quads<kBits, kBlock, kCount>(values, index, stride, q, &next, sums);
  });
}

// --- patterns with windows -----------------------------------------------------------------------

// Four slots' products of every row: `from` is [rows, window].
template <int kWindow, int kRows>
OW_INLINE void add_window(const uint8_t* from, __m512i select, __m512i w, int chain,
                          Sums<kRows>* sums) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    __m512i codes;
    if constexpr (kWindow == 8) {
      long long eight;
      memcpy(&eight, from + r * 8, 8);
      codes = _mm512_set1_epi64(eight);
    } else {
      codes =
          _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * 16)));
    }
    dot4(sums->x[r][chain % Sums<kRows>::kChains], _mm512_shuffle_epi8(codes, select), w);
  }
}

// Bytes of values that are fetched ahead: the processor's prefetchers stop at every page of 4 KiB.
constexpr int64_t kAhead = 2048;

// kCount lines of four slots from line q on, of one index line.
template <int kBits, int kBlock, int kWindow, int kCount, int kRows>
OW_INLINE void add_windows(const uint8_t* values, const IndexReader& index, __m512i blocks,
                           int shift, const uint8_t* x, int64_t q, Sums<kRows>* sums) {
  for (int i = 0; i < kCount * kBits * 8; i += 64) {
    _mm_prefetch(values + q * kBits * 8 + kAhead + i, _MM_HINT_T0);
  }
  index.fetch(q / 8 + kAhead / (kBits * 64));
  LineIndices<kBlock> indices(index, q);
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i, indices.next()) {
    const __m512i w = weights_of<kBits>(values, q + i);
    sums->add_weights(w);
    add_window<kWindow, kRows>(x + ((q + i) >> shift) * kWindow * kRows, indices.get(blocks), w, i,
                               sums);
  }
}

// Lines [begin, end) of four slots; `blocks` are the slots' blocks, in columns from the window's
// first.
template <int kBits, int kBlock, int kWindow, int kRows>
OW_INLINE void add_range(const NmGemmArgs& a, const uint8_t* values, const IndexReader& index,
                         __m512i blocks, const uint8_t* x, int64_t begin, int64_t end,
                         Sums<kRows>* sums) {
  const int shift = kBlock == 16 && a.kept == 8 ? 1 : 0;  // 8:16: a window serves two lines
  in_index_lines<kBlock>(begin, end, [&]<int kCount>(int64_t q) __attribute__((always_inline)) {
    add_windows<kBits, kBlock, kWindow, kCount, kRows>(values, index, blocks, shift, x, q, sums);
  });
}

// --- a panel -------------------------------------------------------------------------------------

template <int kBits, int kBlock, int kWindow, int kRows>
void multiply_rows(const NmGemmArgs& a, int64_t panel, int64_t row) {
  const IndexReader index(a, panel);
  const Quads quads(a);
  const __m512i blocks = _mm512_set1_epi32(int(quads.offset[0]));
  const uint8_t* values = nm_unit_values(a, panel, 0);
  const uint8_t* x = kWindow > 0 ? laid_pass(a, row) : laid_codes(a, row);
  const int64_t lines = div_up(nm_slots(a.k, a.kept, a.block), 4);
  const int64_t group_lines = a.groups == 1 ? lines : a.group_size / a.block * a.kept / 4;
  const VecF unit = set1(kBits == 4 ? 1.0f / 16 : 1.0f);
  alignas(64) float totals[kRows][kNmPanel] = {};  // in memory: the registers hold a group's sums
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t begin = g * group_lines;
    const int64_t end = min_of(begin + group_lines, lines);
    Sums<kRows> sums;
    if constexpr (kWindow == 0) {
      add_lines<kBits, kBlock, kRows>(a, values, index, quads, x, begin, end, &sums);
    } else {
      add_range<kBits, kBlock, kWindow, kRows>(a, values, index, blocks, x, begin, end, &sums);
    }
    const VecF scale = mul(load_scales(a, panel, g), unit);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      store(totals[r], fma(sums.of_row(r), scale, load(totals[r])));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    store(totals[r], mul(load(totals[r]), set1(a.x_scales[row + r])));
    finish(a, row + r, panel * kNmPanel, totals[r]);
  }
}

template <int kBits, int kBlock, int kWindow, int kRows = most_rows(kWindow)>
OW_INLINE void multiply_pass(const NmGemmArgs& a, int64_t panel, int64_t row, int64_t rows) {
  if (rows == kRows) {
    multiply_rows<kBits, kBlock, kWindow, kRows>(a, panel, row);
  } else if constexpr (kRows > 1) {
    multiply_pass<kBits, kBlock, kWindow, kRows - 1>(a, panel, row, rows);
  }
}

template <int kBits, int kBlock, int kWindow>
void multiply_range(const NmGemmArgs& a, int64_t begin, int64_t end) {
  const Passes passes(a);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t pass = 0; pass < passes.count; ++pass) {
      multiply_pass<kBits, kBlock, kWindow>(a, panel, passes.begin(pass), passes.rows(pass));
    }
  }
}

template <int kBits>
void multiply_bits(const NmGemmArgs& a, int64_t begin, int64_t end) {
  switch (a.block * 100 + window_of(a)) {
    case 408: return multiply_range<kBits, 4, 8>(a, begin, end);
    case 416: return multiply_range<kBits, 4, 16>(a, begin, end);
    case 400: return multiply_range<kBits, 4, 0>(a, begin, end);
    case 808: return multiply_range<kBits, 8, 8>(a, begin, end);
    case 816: return multiply_range<kBits, 8, 16>(a, begin, end);
    case 800: return multiply_range<kBits, 8, 0>(a, begin, end);
    case 1616: return multiply_range<kBits, 16, 16>(a, begin, end);
    case 1600: return multiply_range<kBits, 16, 0>(a, begin, end);
    default: return multiply_range<kBits, 32, 0>(a, begin, end);
  }
}

void multiply_int8(const NmGemmArgs& a, int64_t begin, int64_t end) {
  return a.bits == 4 ? multiply_bits<4>(a, begin, end) : multiply_bits<8>(a, begin, end);
}

}  // namespace
}  // namespace avx512

const NmGemmKernels nm_gemm_int8_avx512 = {avx512::laid_int8_bytes, 1, avx512::lay_out_int8,
                                           avx512::multiply_int8};

}  // namespace ow
