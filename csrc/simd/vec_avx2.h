// Eight lanes: AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include "core/types.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kLanes = 8;
struct VecF {
  __m256 v;
};
struct VecI {
  __m256i v;
};

OW_INLINE __m256i lane_mask(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n < 8 ? n : 8)), lanes);
}
// AVX2 has no 16-bit or 8-bit masked moves: copy exactly the bytes that may be touched.
OW_INLINE __m128i load_u16_n(const void* p, int64_t n) {
  uint16_t buffer[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  memcpy(buffer, p, size_t(2 * (n < 8 ? n : 8)));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(buffer));
}
OW_INLINE VecF widen_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
OW_INLINE __m128i narrow_bf16(VecF a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

OW_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
OW_INLINE VecF load(const bf16* p) {
  return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
OW_INLINE VecF load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
OW_INLINE VecF load_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lane_mask(n))}; }
OW_INLINE VecF load_n(const bf16* p, int64_t n) { return widen_bf16(load_u16_n(p, n)); }
OW_INLINE VecF load_n(const f16* p, int64_t n) { return {_mm256_cvtph_ps(load_u16_n(p, n))}; }

OW_INLINE VecI load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
OW_INLINE VecF load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
OW_INLINE VecF gather(const float* table, VecI at) { return {_mm256_i32gather_ps(table, at.v, 4)}; }

OW_INLINE void store(float* p, VecF a) { _mm256_storeu_ps(p, a.v); }
OW_INLINE void store(bf16* p, VecF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a));
}
OW_INLINE void store(f16* p, VecF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
OW_INLINE void store_n(float* p, VecF a, int64_t n) { _mm256_maskstore_ps(p, lane_mask(n), a.v); }
template <class T>
OW_INLINE void store_n(T* p, VecF a, int64_t n) {
  T buffer[8];
  store(buffer, a);
  memcpy(p, buffer, size_t(2 * (n < 8 ? n : 8)));
}
OW_INLINE void store_i8_n(int8_t* p, VecI a, int64_t n) {
  const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(0xff));
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
  memcpy(p, &bytes, size_t(n < 8 ? n : 8));
}
OW_INLINE void store_i8(int8_t* p, VecI a) { store_i8_n(p, a, 8); }

OW_INLINE VecF set1(float v) { return {_mm256_set1_ps(v)}; }
OW_INLINE VecI set1(int32_t v) { return {_mm256_set1_epi32(v)}; }
OW_INLINE VecF add(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
OW_INLINE VecF sub(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
OW_INLINE VecF mul(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
OW_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
OW_INLINE VecF div_(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
OW_INLINE VecF max_(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
OW_INLINE VecI add(VecI a, VecI b) { return {_mm256_add_epi32(a.v, b.v)}; }
OW_INLINE VecI sub(VecI a, VecI b) { return {_mm256_sub_epi32(a.v, b.v)}; }
OW_INLINE VecI max_(VecI a, VecI b) { return {_mm256_max_epi32(a.v, b.v)}; }
OW_INLINE VecI bit_and(VecI a, VecI b) { return {_mm256_and_si256(a.v, b.v)}; }
OW_INLINE VecI shift_left(VecI a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
OW_INLINE VecI shift_right(VecI a, int n) { return {_mm256_srai_epi32(a.v, n)}; }

OW_INLINE VecI to_int(VecF a) { return {_mm256_cvtps_epi32(a.v)}; }
OW_INLINE VecF to_float(VecI a) { return {_mm256_cvtepi32_ps(a.v)}; }
OW_INLINE VecF as_float(VecI a) { return {_mm256_castsi256_ps(a.v)}; }
OW_INLINE VecI as_int(VecF a) { return {_mm256_castps_si256(a.v)}; }
OW_INLINE VecI abs_bits(VecF a) {
  return {_mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x7fffffff))};
}

template <int kDistance>
OW_INLINE VecF swap_lanes(VecF a) {
  if constexpr (kDistance == 1) return {_mm256_permute_ps(a.v, 0xb1)};
  if constexpr (kDistance == 2) return {_mm256_permute_ps(a.v, 0x4e)};
  if constexpr (kDistance == 4) return {_mm256_permute2f128_ps(a.v, a.v, 0x01)};
}

OW_INLINE void transpose(VecF (&rows)[8]) {
  __m256 pairs[8];  // of rows 2i, 2i + 1: columns 0, 1 and 4, 5; then 2, 3 and 6, 7
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  __m256 fours[8];  // of rows 0 .. 3, then 4 .. 7: columns c and c + 4
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

OW_INLINE VecF sums_of(VecF (&rows)[8]) {
  __m256 fours[2];  // of rows 4 i .. 4 i + 3: a sum of each 128 bits
  for (int i = 0; i < 2; ++i) {
    const __m256 low = _mm256_hadd_ps(rows[4 * i].v, rows[4 * i + 1].v);
    const __m256 high = _mm256_hadd_ps(rows[4 * i + 2].v, rows[4 * i + 3].v);
    fours[i] = _mm256_hadd_ps(low, high);
  }
  const __m256 low = _mm256_permute2f128_ps(fours[0], fours[1], 0x20);
  const __m256 high = _mm256_permute2f128_ps(fours[0], fours[1], 0x31);
  return {_mm256_add_ps(low, high)};
}

OW_INLINE float sum(VecF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
OW_INLINE int32_t sum(VecI a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
OW_INLINE float max_of_lanes(VecF a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
OW_INLINE int32_t max_of_lanes(VecI a) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

}  // namespace
}  // namespace ow::OW_TARGET
