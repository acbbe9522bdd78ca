#include <immintrin.h>

#include "testing/peaks.h"

namespace ow {

double peak_fp32_avx2(int64_t rounds, float* sink) {
  __m256 acc[kPeakChains];
  for (auto& a : acc) a = _mm256_setzero_ps();
  const __m256 w = _mm256_set1_ps(*sink + 0.999f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) a = _mm256_fmadd_ps(a, w, w);
  }
  for (auto& a : acc) *sink += _mm256_cvtss_f32(a);
  return double(rounds) * kPeakChains * 8 * 2;
}

double peak_int8_avx2(int64_t rounds, float* sink) {
  __m256i acc[kPeakChains];
  for (auto& a : acc) a = _mm256_setzero_si256();
  __m256i w = _mm256_set1_epi8(int8_t(*sink) + 3);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) {
      a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w), ones));
    }
  }
  for (auto& a : acc) *sink += float(_mm256_extract_epi32(a, 0));
  return double(rounds) * kPeakChains * 32 * 2;
}

uint64_t stream_read_avx2(const uint8_t* data, int64_t bytes) {
  __m256i digest[4];
  for (auto& d : digest) d = _mm256_setzero_si256();
  for (int64_t i = 0; i + 128 <= bytes; i += 128) {
    for (int c = 0; c < 4; ++c) {
      const __m256i* p = reinterpret_cast<const __m256i*>(data + i + c * 32);
      digest[c] = _mm256_xor_si256(digest[c], _mm256_loadu_si256(p));
    }
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(digest[0], digest[1]),
                                       _mm256_xor_si256(digest[2], digest[3]));
  return uint64_t(_mm256_extract_epi64(all, 0));
}

}  // namespace ow
