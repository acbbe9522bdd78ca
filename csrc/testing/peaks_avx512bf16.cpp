#include <immintrin.h>

#include "testing/peaks.h"

namespace ow {

double peak_bf16_avx512bf16(int64_t rounds, float* sink) {
  __m512 acc[kPeakChains];
  for (auto& a : acc) a = _mm512_setzero_ps();
  const __m512bh w = (__m512bh)_mm512_set1_epi16(int16_t(0x3f00 + int(*sink)));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) a = _mm512_dpbf16_ps(a, w, w);
  }
  for (auto& a : acc) *sink += _mm512_cvtss_f32(a);
  return double(rounds) * kPeakChains * 32 * 2;
}

}  // namespace ow
