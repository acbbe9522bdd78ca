// What the engines of bf16 products share: operands as they lie in memory, weights rounded to bf16.
#pragma once

#include "kernels/block_attention/block_attention_body.h"

namespace ow::OW_TARGET {
namespace {

// Elements c .. c + 31 of a row of d, zeros past it.
OW_INLINE __m512i load_depth(const void* row, int64_t c, int64_t d) {
  if (c >= d) return _mm512_setzero_si512();
  const __mmask32 mask = d - c >= 32 ? ~0u : (1u << (d - c)) - 1;
  return _mm512_maskz_loadu_epi16(mask, static_cast<const bf16*>(row) + c);
}

struct Bf16Operands {
  using Element = bf16;
  static constexpr int64_t kPair = 2;
  static constexpr int64_t kDepth = 32;
  static constexpr int64_t kTileUnits = 8;  // 32 KiB of weights

  // Pairs of dimensions are 32-bit elements; those of 16 queries are transposed.
  static void pack_queries(const void* const* rows, int64_t count, FloatType, int64_t d,
                           int64_t padded, bool negative, bf16* out) {
    const __m512i signs = _mm512_set1_epi32(negative ? int(0x80008000) : 0);
    for (int64_t c = 0; c < padded; c += 32) {
      VecF pairs[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const __m512i row = r < count ? load_depth(rows[r], c, d) : _mm512_setzero_si512();
        pairs[r] = as_float(VecI{_mm512_xor_si512(row, signs)});
      }
      transpose(pairs);
      for (int64_t p = 0; p < kLanes; ++p) {
        _mm512_store_si512(out + (c / 2 + p) * kQueryTile * 2, as_int(pairs[p]).v);
      }
    }
  }

  static void copy_row(const void* from, FloatType, int64_t d, int64_t padded, bf16* to) {
    for (int64_t c = 0; c < padded; c += 32) {
      _mm512_storeu_si512(to + c, load_depth(from, c, d));
    }
  }

  // Rows 2 p and 2 p + 1, zeros from `count` on: elements c .. c + 15 of both, in pairs.
  __attribute__((always_inline)) static __m512i load_pairs(const void* const* rows, int64_t count,
                                                           int64_t p, int64_t c, int64_t d) {
    const auto load_row = [&](int64_t j) __attribute__((always_inline)) {
      if (j >= count || c >= d) return _mm512_setzero_si512();
      const __m256i row =
          _mm256_maskz_loadu_epi16(lane_mask(d - c), static_cast<const bf16*>(rows[j]) + c);
      return _mm512_cvtepu16_epi32(row);
    };
    return _mm512_or_si512(load_row(2 * p), _mm512_slli_epi32(load_row(2 * p + 1), 16));
  }

  // Pairs of keys, as elements of 32 bits, are transposed.
  static void transpose_values(const void* const* rows, int64_t count, FloatType, int64_t dv,
                               int64_t padded, bf16* out) {
    for (int64_t c = 0; c < padded; c += kLanes) {
      VecF pairs[kLanes];
      for (int64_t p = 0; p < kLanes; ++p) {
        pairs[p] = as_float(VecI{load_pairs(rows, count, p, c, dv)});
      }
      transpose(pairs);
      for (int64_t r = 0; r < kLanes; ++r) {
        _mm512_storeu_si512(out + (c + r) * kUnitKeys, as_int(pairs[r]).v);
      }
    }
  }

  static void pack_panels(const void* const* rows, int64_t count, FloatType, int64_t d, bf16* out) {
    for (int64_t p = 0; 2 * p < count; ++p) {
      for (int64_t c = 0; c < d; c += kLanes) {
        bf16* panel = out + c / kQueryTile * kQueryTile * kQueryTile;
        _mm512_storeu_si512(panel + (p * kQueryTile + c % kQueryTile) * 2,
                            load_pairs(rows, count, p, c, d));
      }
    }
  }

  // Dimensions are paired before they are transposed, 32 at a time.
  static void write_outputs(const float* o, VecF inverse, int64_t count, FloatType, int64_t dv,
                            void* const* out) {
    for (int64_t c = 0; c < dv; c += 32) {
      VecF pairs[kLanes];
      for (int64_t p = 0; p < kLanes; ++p) {
        pairs[p] = set1(0.0f);
        if (c + 2 * p >= dv) continue;
        const float* even = o + (c + 2 * p) * kQueryTile;
        pairs[p] = as_float(
            VecI{round_pairs(mul(load(even), inverse), mul(load(even + kQueryTile), inverse))});
      }
      transpose(pairs);
      const __mmask32 mask = dv - c >= 32 ? ~0u : (1u << (dv - c)) - 1;
      for (int64_t r = 0; r < min_of(kLanes, count); ++r) {
        _mm512_mask_storeu_epi16(static_cast<bf16*>(out[r]) + c, mask, as_int(pairs[r]).v);
      }
    }
  }

  // 2^floor(x) times a polynomial of what is left; relative error below 7.5e-5, a fiftieth of what
  // rounding to bf16 adds.
  __attribute__((always_inline)) static VecF exp2(VecF x) {
    const __m512 r = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(7.80245215e-2f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.26067156e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.95833564e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.99925196e-1f));
    return {_mm512_scalef_ps(p, x.v)};
  }

  __attribute__((always_inline)) static void store_weights(bf16* weights, int64_t j, int64_t i,
                                                           VecF even, VecF odd) {
    const __m512i pairs = round_pairs(even, odd);
    _mm512_store_si512(weights + j * kQueryTile + 2 * i, pairs);
  }
  __attribute__((always_inline)) static void store_rows(bf16* rows, int64_t j, int64_t i, VecF even,
                                                        VecF odd) {
    const __m512i both = __m512i(_mm512_cvtne2ps_pbh(odd.v, even.v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + j * kQueryTile + i),
                        _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + (j + 1) * kQueryTile + i),
                        _mm512_extracti64x4_epi64(both, 1));
  }
  __attribute__((always_inline)) static void load_weights(const bf16* weights, int64_t j, int64_t i,
                                                          VecF* even, VecF* odd) {
    const __m512i pairs = _mm512_load_si512(weights + j * kQueryTile + 2 * i);
    *even = as_float(VecI{_mm512_slli_epi32(pairs, 16)});
    *odd = as_float(VecI{_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)))});
  }

 private:
  // Of each lane: `even` in the low half, `odd` in the high one.
  __attribute__((always_inline)) static __m512i round_pairs(VecF even, VecF odd) {
    return _mm512_permutexvar_epi16(pair_order(), __m512i(_mm512_cvtne2ps_pbh(odd.v, even.v)));
  }
  // Element e of the first half, then of the second.
  __attribute__((always_inline)) static __m512i pair_order() {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i second = _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16);
    return _mm512_or_si512(lanes, second);
  }
};

// Products of pairs: as those of floats, at twice the depth.
struct DotEngine : Bf16Operands {
  static constexpr int kVectors = 4;
  static constexpr int kRows = 6;

  using Column = __m512i;
  __attribute__((always_inline)) static __m512i load_column(const bf16* p) {
    return _mm512_load_si512(p);
  }
  __attribute__((always_inline)) static __m512i broadcast(const bf16* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  __attribute__((always_inline)) static void accumulate(VecF& sum, __m512i left, __m512i column) {
    dot2(sum, left, column);
  }

  static void multiply(const Product<bf16>& p) { ow::OW_TARGET::multiply<DotEngine>(p); }
};

}  // namespace
}  // namespace ow::OW_TARGET
