// One row of x and few values: where a mask chooses up to 16 of 64 columns, as almost all do where
// an eighth is stored, they make one vector.
//
//   mask  0 1 1 0 0 1 ...     columns  1 2 5 ...     values * x[columns]
//
// vpcompressb makes the columns of a mask, and permutes fetch their x from the four registers that
// hold a block's. A fuller mask takes a turn for each 16.
#include <immintrin.h>

#include "kernels/sparse_gemm/sparse_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

// sum + value_j * x[column_j] for the first `count` of 16 columns. Lanes past them are left alone,
// so neither an infinite x nor another row's value does harm.
template <class T>
OW_INLINE __m512 add_selected(__m128i columns, uint32_t count, const T* value, const __m512* x,
                              __m512 sum) {
  const __m512i index = _mm512_cvtepu8_epi32(columns);
  const __m512 low = _mm512_permutex2var_ps(x[0], index, x[1]);
  const __m512 high = _mm512_permutex2var_ps(x[2], index, x[3]);
  const __mmask16 is_high = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  const __m512 selected = _mm512_mask_blend_ps(is_high, low, high);
  const __mmask16 lanes = __mmask16(_bzhi_u32(0xffff, count));
  return _mm512_mask3_fmadd_ps(load(value).v, selected, sum, lanes);
}

// Values 16 and on of a row of a block.
template <class T>
__attribute__((noinline)) __m512 add_rest(__m512i columns, uint32_t count, const T* value,
                                          const __m512* x, __m512 sum) {
  alignas(64) uint8_t bytes[kMaskK];
  _mm512_store_si512(bytes, columns);
  for (uint32_t i = kLanes; i < count; i += kLanes) {
    const __m128i piece = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes + i));
    sum = add_selected(piece, count - i, value + i, x, sum);
  }
  return sum;
}

// The hardware alone fetches too late: so many values and blocks of masks ahead.
constexpr int64_t kValuesAhead = 1024;
constexpr int64_t kBlocksAhead = 16;

template <class T>
void select_panel(const SparseGemmArgs& a, int64_t row, int64_t panel) {
  const __m512i all_columns = _mm512_set_epi8(
      63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41,
      40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18,
      17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512 sums[kSparsePanel];
#pragma GCC unroll 16
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t b = 0; b < a.w.k_blocks; ++b) {
    __m512 x[4];
#pragma GCC unroll 4
    for (int64_t q = 0; q < 4; ++q) {
      x[q] = _mm512_loadu_ps(a.x + row_place(a.m, row, b * kMaskK + q * kLanes));
    }
    const int64_t block = panel * a.w.k_blocks + b;
    const uint64_t* masks = a.w.masks + block * kSparsePanel;
    const T* value = static_cast<const T*>(a.values) + a.w.offsets[block];
    __builtin_prefetch(masks + kBlocksAhead * kSparsePanel);
    __builtin_prefetch(masks + kBlocksAhead * kSparsePanel + 8);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kSparsePanel; ++r) {
      if (r % 2 == 0) __builtin_prefetch(value + kValuesAhead);
      uint64_t mask = masks[r];
      asm("" : "+r"(mask));  // gcc would count the bits of the mask register, a slow way round
      const uint32_t count = uint32_t(__builtin_popcountll(mask));
      const __m512i columns = _mm512_maskz_compress_epi8(mask, all_columns);
      sums[r] = add_selected(_mm512_castsi512_si128(columns), count, value, x, sums[r]);
      if (__builtin_expect(count > kLanes, 0))
        sums[r] = add_rest(columns, count, value, x, sums[r]);
      value += count;
    }
  }
  float line[kSparsePanel];
  for (int64_t r = 0; r < kSparsePanel; ++r) line[r] = _mm512_reduce_add_ps(sums[r]);
  finish_line(a, row, panel * kSparsePanel, load(line));
}

void run_select(const SparseGemmArgs& a, int64_t begin, int64_t end, float*) {
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t row = 0; row < a.m; ++row) {
      switch (a.value_type) {
        case ValueType::f32: select_panel<float>(a, row, panel); break;
        case ValueType::bf16: select_panel<bf16>(a, row, panel); break;
        case ValueType::i8: select_panel<int8_t>(a, row, panel); break;
      }
    }
  }
}

}  // namespace
}  // namespace ow::OW_TARGET

namespace ow {

const SparseGemmKernel sparse_gemm_select_avx512 = {avx512::run_select, avx512::prepare, 0};

}  // namespace ow
