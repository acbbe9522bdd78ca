// Beside the kernels over tokens, one for few rows: a mask expands packed values into the lanes of
// their k, which multiply 16 x of each row.
//
//   values  a b c ...      mask  0 1 1 0 0 1 ...      lanes  . a b . . c ...
//
// A table says for each eight bits of a mask which value a lane takes, and a permute fetches it:
// Zen 4 does two such permutes in a cycle, and vexpandps, which needs no table, in five. The cost
// is the same whatever the sparsity.
#include <immintrin.h>

#include "kernels/sparse_gemm/sparse_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

// Of eight lanes that a mask chooses, the value of each: its place among those stored.
struct LaneTable {
  uint8_t of[256][8];
};
constexpr LaneTable lane_table() {
  LaneTable table{};
  for (int mask = 0; mask < 256; ++mask) {
    uint8_t next = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if ((mask >> lane & 1) != 0) table.of[mask][lane] = next++;
    }
  }
  return table;
}
constexpr LaneTable kLaneTable = lane_table();

OW_INLINE __m256 eight_values(const float* p) { return _mm256_loadu_ps(p); }
OW_INLINE __m256 eight_values(const bf16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_epi16(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
OW_INLINE __m256 eight_values(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
}

// Lanes that `mask`, eight bits, leaves out hold any value.
template <class T>
OW_INLINE __m256 expand_eight(uint64_t mask, const T* value) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadu_si64(kLaneTable.of[mask]));
  return _mm256_permutevar8x32_ps(eight_values(value), lanes);
}

// acc[i] += one row of a block times 64 k of rows i of x, 16 k of which are `stride` floats apart.
// The masked multiply leaves lanes that are not stored alone, so an infinite x there does no harm.
template <int kRows, class T>
OW_INLINE void expand_row(uint64_t mask, const T* value, const float* x, int64_t stride,
                          __m512* acc) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const uint64_t low = mask >> (16 * q) & 0xff;
    const uint64_t high = mask >> (16 * q + 8) & 0xff;
    const __m256 lower = expand_eight(low, value);
    value += __builtin_popcountll(low);
    const __m256 upper = expand_eight(high, value);
    value += __builtin_popcountll(high);
    const __m512 w = _mm512_insertf32x8(_mm512_castps256_ps512(lower), upper, 1);
    const __mmask16 lanes = __mmask16(mask >> (16 * q));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const __m512 columns = _mm512_loadu_ps(x + q * stride + i * 16);
      acc[i] = _mm512_mask3_fmadd_ps(w, columns, acc[i], lanes);
    }
  }
}

// Rows [row, row + kRows) of y for one panel.
template <int kRows, class T>
void expand_panel(const SparseGemmArgs& a, int64_t row, int64_t panel) {
  const SparsePattern& w = a.w;
  const int64_t stride = a.m * 16;
  const float* x = a.x + row * 16;
  __m512 acc[kSparsePanel][kRows];
  for (auto& output : acc) {
    for (__m512& sum : output) sum = _mm512_setzero_ps();
  }
  for (int64_t b = 0; b < w.k_blocks; ++b, x += 4 * stride) {
    const int64_t block = panel * w.k_blocks + b;
    const uint64_t* masks = w.masks + block * kSparsePanel;
    const T* value = static_cast<const T*>(a.values) + w.offsets[block];
    for (int64_t r = 0; r < kSparsePanel; ++r) {
      __m512 sums[kRows];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) sums[i] = acc[r][i];
      expand_row<kRows>(masks[r], value, x, stride, sums);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) acc[r][i] = sums[i];
      value += __builtin_popcountll(masks[r]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    float line[kSparsePanel];
    for (int64_t r = 0; r < kSparsePanel; ++r) line[r] = _mm512_reduce_add_ps(acc[r][i]);
    finish_line(a, row + i, panel * kSparsePanel, load(line));
  }
}

template <int kRows>
void expand_rows(const SparseGemmArgs& a, int64_t row, int64_t panel) {
  switch (a.value_type) {
    case ValueType::f32: return expand_panel<kRows, float>(a, row, panel);
    case ValueType::bf16: return expand_panel<kRows, bf16>(a, row, panel);
    case ValueType::i8: return expand_panel<kRows, int8_t>(a, row, panel);
  }
}

// A panel's values are in L1 or L2 after the first piece of rows.
void run_expand(const SparseGemmArgs& a, int64_t begin, int64_t end, float*) {
  for (int64_t panel = begin; panel < end; ++panel) {
    int64_t row = 0;
    for (; row + 16 <= a.m; row += 16) expand_rows<16>(a, row, panel);
    for (; row + 8 <= a.m; row += 8) expand_rows<8>(a, row, panel);
    for (; row + 4 <= a.m; row += 4) expand_rows<4>(a, row, panel);
    for (; row + 2 <= a.m; row += 2) expand_rows<2>(a, row, panel);
    for (; row < a.m; ++row) expand_rows<1>(a, row, panel);
  }
}

// Four values are one load, where each broadcast would be one: the load ports bind. Fetching as the
// values are visited delays no load, where all of the next block at once would.
struct AddFourByFour {
  static constexpr bool kFetches = true;
  template <int kVecs>
  OW_INLINE void add(uint64_t mask, const float* value, int64_t ahead, const float* x, VecF* acc) {
    asm("" : "+r"(mask));  // gcc would count the bits of the mask register, a slow way round
    const float* end = value + __builtin_popcountll(mask);
    for (; value + 4 <= end; value += 4) {
      __builtin_prefetch(reinterpret_cast<const char*>(value) + ahead);
      const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(value));
      add_column<kVecs>(mask, {_mm512_permute_ps(four, 0x00)}, x, acc);
      add_column<kVecs>(mask, {_mm512_permute_ps(four, 0x55)}, x, acc);
      add_column<kVecs>(mask, {_mm512_permute_ps(four, 0xaa)}, x, acc);
      add_column<kVecs>(mask, {_mm512_permute_ps(four, 0xff)}, x, acc);
    }
    for (; value < end; ++value) add_column<kVecs>(mask, set1(*value), x, acc);
  }
};

}  // namespace
}  // namespace ow::OW_TARGET

namespace ow {

const SparseGemmKernel sparse_gemm_expand_avx512 = {avx512::run_expand, avx512::prepare, 0};
const SparseGemmKernel sparse_gemm_tokens_avx512 = {avx512::run_tokens<avx512::AddFourByFour>,
                                                    avx512::prepare, avx512::kWidest};
const SampledGemmKernel sampled_gemm_avx512 = {avx512::run_sampled, avx512::prepare,
                                               avx512::kWidest};

}  // namespace ow
