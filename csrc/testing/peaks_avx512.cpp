#include <immintrin.h>

#include "testing/peaks.h"

namespace ow {

double peak_fp32_avx512(int64_t rounds, float* sink) {
  __m512 acc[kPeakChains];
  for (auto& a : acc) a = _mm512_setzero_ps();
  const __m512 w = _mm512_set1_ps(*sink + 0.999f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) a = _mm512_fmadd_ps(a, w, w);
  }
  for (auto& a : acc) *sink += _mm512_cvtss_f32(a);
  return double(rounds) * kPeakChains * 16 * 2;
}

double peak_int8_avx512(int64_t rounds, float* sink) {
  __m512i acc[kPeakChains];
  for (auto& a : acc) a = _mm512_setzero_si512();
  const __m512i w = _mm512_set1_epi8(int8_t(*sink) + 3);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) a = _mm512_dpbusd_epi32(a, w, w);
  }
  for (auto& a : acc) *sink += float(_mm512_cvtsi512_si32(a));
  return double(rounds) * kPeakChains * 64 * 2;
}

uint64_t stream_read_avx512(const uint8_t* data, int64_t bytes) {
  __m512i digest[4];
  for (auto& d : digest) d = _mm512_setzero_si512();
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int c = 0; c < 4; ++c) {
      digest[c] = _mm512_xor_si512(digest[c], _mm512_loadu_si512(data + i + c * 64));
    }
  }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(digest[0], digest[1]),
                                       _mm512_xor_si512(digest[2], digest[3]));
  return uint64_t(_mm_cvtsi128_si64(_mm512_castsi512_si128(all)));
}

}  // namespace ow
