// Sixteen lanes: AVX-512 F, BW, DQ, VL. Masked moves never touch lanes past n.
#pragma once

#include <immintrin.h>

#include "core/types.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kLanes = 16;
struct VecF {
  __m512 v;
};
struct VecI {
  __m512i v;
};

OW_INLINE __mmask16 lane_mask(int64_t n) { return __mmask16(n < 16 ? (1u << n) - 1 : 0xffffu); }

OW_INLINE VecF widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
OW_INLINE __m256i narrow_bf16(VecF a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

OW_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
OW_INLINE VecF load(const bf16* p) { return widen_bf16(_mm256_loadu_epi16(p)); }
OW_INLINE VecF load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_epi16(p))}; }
OW_INLINE VecF load_n(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(lane_mask(n), p)};
}
OW_INLINE VecF load_n(const bf16* p, int64_t n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(lane_mask(n), p));
}
OW_INLINE VecF load_n(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(n), p))};
}

// 32 bf16 as the even elements and the odd ones: fewer instructions than two loads take.
OW_INLINE void load_pair(const bf16* p, VecF (&pair)[2]) {
  const __m512i bits = _mm512_loadu_si512(p);
  pair[0].v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  pair[1].v = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int32_t(0xffff0000))));
}
// 32 floats in order, as even and odd elements, and back.
OW_INLINE void to_pair_order(const bf16*, VecF (&pair)[2]) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 first = pair[0].v;
  pair[0].v = _mm512_permutex2var_ps(first, even, pair[1].v);
  pair[1].v = _mm512_permutex2var_ps(first, odd, pair[1].v);
}
OW_INLINE void from_pair_order(const bf16*, VecF (&pair)[2]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 even = pair[0].v;
  pair[0].v = _mm512_permutex2var_ps(even, low, pair[1].v);
  pair[1].v = _mm512_permutex2var_ps(even, high, pair[1].v);
}

#if defined(__AVX512BF16__)
// 32 bf16, whose products are summed two to a lane.
struct VecBf16 {
  __m512bh v;
};
constexpr int64_t factors_of(const bf16*) { return 32; }
OW_INLINE VecBf16 load_factors(const bf16* p) { return {__m512bh(_mm512_loadu_si512(p))}; }
OW_INLINE VecBf16 load_factors_n(const bf16* p, int64_t n) {
  const __mmask32 mask = n < 32 ? (1u << n) - 1 : 0xffffffffu;
  return {__m512bh(_mm512_maskz_loadu_epi16(mask, p))};
}
OW_INLINE VecF fma(VecBf16 a, VecBf16 b, VecF c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }
// sum += two products a lane, where many sums are in registers: round the intrinsic gcc 12 copies
// them. (In simd/attention.h it is the other way round: there asm leaves sums in memory.)
OW_INLINE void dot2(VecF& sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a), "v"(b));
}
OW_INLINE void dot2(VecF& sum, __m512i a, const uint8_t* b) {
  asm("vdpbf16ps %2, %1, %0"
      : "+v"(sum.v)
      : "v"(a), "m"(*reinterpret_cast<const uint8_t(*)[64]>(b)));
}
#endif

OW_INLINE VecI load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
OW_INLINE VecF load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_epi8(p)))};
}
OW_INLINE VecF gather(const float* table, VecI at) { return {_mm512_i32gather_ps(at.v, table, 4)}; }

OW_INLINE void store(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
OW_INLINE void store(bf16* p, VecF a) { _mm256_storeu_epi16(p, narrow_bf16(a)); }
OW_INLINE void store(f16* p, VecF a) {
  _mm256_storeu_epi16(p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
OW_INLINE void store_n(float* p, VecF a, int64_t n) { _mm512_mask_storeu_ps(p, lane_mask(n), a.v); }
OW_INLINE void store_n(bf16* p, VecF a, int64_t n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), narrow_bf16(a));
}
OW_INLINE void store_n(f16* p, VecF a, int64_t n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
OW_INLINE void store_i8(int8_t* p, VecI a) { _mm_storeu_epi8(p, _mm512_cvtepi32_epi8(a.v)); }
OW_INLINE void store_i8_n(int8_t* p, VecI a, int64_t n) {
  _mm_mask_storeu_epi8(p, lane_mask(n), _mm512_cvtepi32_epi8(a.v));
}

OW_INLINE VecF set1(float v) { return {_mm512_set1_ps(v)}; }
OW_INLINE VecI set1(int32_t v) { return {_mm512_set1_epi32(v)}; }
OW_INLINE VecF add(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
OW_INLINE VecF sub(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
OW_INLINE VecF mul(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
OW_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
OW_INLINE VecF div_(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
OW_INLINE VecF max_(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
OW_INLINE VecI add(VecI a, VecI b) { return {_mm512_add_epi32(a.v, b.v)}; }
OW_INLINE VecI sub(VecI a, VecI b) { return {_mm512_sub_epi32(a.v, b.v)}; }
OW_INLINE VecI max_(VecI a, VecI b) { return {_mm512_max_epi32(a.v, b.v)}; }
OW_INLINE VecI bit_and(VecI a, VecI b) { return {_mm512_and_si512(a.v, b.v)}; }
OW_INLINE VecI shift_left(VecI a, int n) { return {_mm512_slli_epi32(a.v, unsigned(n))}; }
OW_INLINE VecI shift_right(VecI a, int n) { return {_mm512_srai_epi32(a.v, unsigned(n))}; }

OW_INLINE VecI to_int(VecF a) { return {_mm512_cvtps_epi32(a.v)}; }
OW_INLINE VecF to_float(VecI a) { return {_mm512_cvtepi32_ps(a.v)}; }
OW_INLINE VecF as_float(VecI a) { return {_mm512_castsi512_ps(a.v)}; }
OW_INLINE VecI as_int(VecF a) { return {_mm512_castps_si512(a.v)}; }
OW_INLINE VecI abs_bits(VecF a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}

template <int kDistance>
OW_INLINE VecF swap_lanes(VecF a) {
  if constexpr (kDistance == 1) return {_mm512_permute_ps(a.v, 0xb1)};
  if constexpr (kDistance == 2) return {_mm512_permute_ps(a.v, 0x4e)};
  if constexpr (kDistance == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  if constexpr (kDistance == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
}

OW_INLINE void transpose(VecF (&rows)[16]) {
  __m512 pairs[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  __m512 fours[16];  // of rows i .. i + 3: columns c, c + 4, c + 8, c + 12
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(fours[c], fours[c + 4], 0x88);  // columns c, c + 8
    const __m512 low2 = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(fours[c], fours[c + 4], 0xdd);  // c + 4, c + 12
    const __m512 high2 = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], 0xdd);
    rows[c].v = _mm512_shuffle_f32x4(low, low2, 0x88);
    rows[c + 8].v = _mm512_shuffle_f32x4(low, low2, 0xdd);
    rows[c + 4].v = _mm512_shuffle_f32x4(high, high2, 0x88);
    rows[c + 12].v = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}

// 31 shuffles, where 16 sums one by one would take 64.
OW_INLINE VecF sums_of(VecF (&rows)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // of rows i and i + 8: eight lanes each
    const __m512 low = _mm512_shuffle_f32x4(rows[i].v, rows[i + 8].v, 0x44);
    const __m512 high = _mm512_shuffle_f32x4(rows[i].v, rows[i + 8].v, 0xee);
    rows[i].v = _mm512_add_ps(low, high);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // of rows i, i + 4, i + 8, i + 12: four lanes each
    const __m512 low = _mm512_shuffle_f32x4(rows[i].v, rows[i + 4].v, 0x88);
    const __m512 high = _mm512_shuffle_f32x4(rows[i].v, rows[i + 4].v, 0xdd);
    rows[i].v = _mm512_add_ps(low, high);
  }
  __m512 pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __m512 low = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    const __m512 high = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    pairs[i] = _mm512_add_ps(low, high);
  }
  const __m512 low = _mm512_shuffle_ps(pairs[0], pairs[1], 0x44);
  const __m512 high = _mm512_shuffle_ps(pairs[0], pairs[1], 0xee);
  const __m512 sums = _mm512_add_ps(low, high);  // rows 0 .. 3, 8 .. 11, 4 .. 7, 12 .. 15
  return {_mm512_shuffle_f32x4(sums, sums, 0xd8)};
}

OW_INLINE float sum(VecF a) { return _mm512_reduce_add_ps(a.v); }
OW_INLINE int32_t sum(VecI a) { return _mm512_reduce_add_epi32(a.v); }
OW_INLINE float max_of_lanes(VecF a) { return _mm512_reduce_max_ps(a.v); }
OW_INLINE int32_t max_of_lanes(VecI a) { return _mm512_reduce_max_epi32(a.v); }

}  // namespace
}  // namespace ow::OW_TARGET
