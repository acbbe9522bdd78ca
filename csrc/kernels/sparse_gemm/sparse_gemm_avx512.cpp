// Beside the kernels over tokens, one for few rows: a mask expands 16 packed values into the lanes
// of their k, which multiply 16 x of each row.
//
//   values  a b c ...      mask  0 1 1 0 0 1 ...      lanes  . a b . . c ...
//
// Sixteen weights cost two permutes for the expansion and one for moving the mask, whatever the
// sparsity, against 4 bytes a value and 1/8 a weight: memory is slower by far at m = 1. Each row of
// a block needs the place of its first value, the one before plus a count of bits; the counts
// of the four masks of 16 are of the row's mask, so that chain is one step a row.
#include <immintrin.h>

#include "kernels/sparse_gemm/sparse_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

OW_INLINE __m512 sixteen_values(const float* p) { return _mm512_loadu_ps(p); }
OW_INLINE __m512 sixteen_values(const bf16* p) { return widen_bf16(_mm256_loadu_epi16(p)).v; }
OW_INLINE __m512 sixteen_values(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_epi8(p)));
}

// acc[i] += one row of a block times 64 k of rows i of x, 16 k of which are `stride` floats apart.
// The masked multiply leaves lanes that are not stored alone, so an infinite x there does no harm.
template <int kRows, class T>
OW_INLINE void expand_row(uint64_t mask, const T* value, const float* x, int64_t stride,
                          __m512* acc) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    __mmask16 lanes = __mmask16(mask >> (16 * q));
    // One mask register: gcc would move the bits to a second one for the multiply.
    asm("" : "+Yk"(lanes));
    const T* from = value + __builtin_popcountll(mask & ((uint64_t{1} << (16 * q)) - 1));
    const __m512 w = _mm512_maskz_expand_ps(lanes, sixteen_values(from));
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
    const int64_t n = panel * kSparsePanel;
    switch (a.y_type) {
      case FloatType::f32: finish_outputs<float>(a, row + i, n, w.n, load(line)); break;
      case FloatType::bf16: finish_outputs<bf16>(a, row + i, n, w.n, load(line)); break;
      case FloatType::f16: finish_outputs<f16>(a, row + i, n, w.n, load(line)); break;
    }
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

}  // namespace
}  // namespace ow::OW_TARGET

namespace ow {

const SparseGemmKernel sparse_gemm_expand_avx512 = {avx512::run_expand, avx512::prepare, 0};
const SparseGemmKernel sparse_gemm_tokens_avx512 = {avx512::run_tokens, avx512::prepare,
                                                    avx512::kWidest};
const SampledGemmKernel sampled_gemm_avx512 = {avx512::run_sampled, avx512::prepare,
                                               avx512::kWidest};

}  // namespace ow
