#include "kernels/block_attention/block_attention_avx512bf16.h"

namespace ow {
namespace avx512bf16 {
namespace {

// Products of pairs: as those of floats, at twice the depth.
struct DotEngine : Bf16Operands {
  static constexpr int kVectors = 4;
  static constexpr int kRows = 6;

  template <int kR, int kV>
  static void multiply_rows(const Product<bf16>& p, int64_t row, int64_t lane) {
    float* c = p.c + row * kQueryTile + lane;
    __m512 sums[kR][kV];
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) {
        const float* from = c + r * kQueryTile + v * kLanes;
        sums[r][v] = p.add ? _mm512_load_ps(from) : _mm512_setzero_ps();
      }
    }
    const bf16* b = p.b + 2 * lane;
    for (int64_t s = 0; s < p.segments; ++s) {
      const bf16* a = p.a[s] + row * p.row_stride;
      for (int64_t i = 0; i < p.depth; i += 2, b += 2 * kQueryTile) {
        __m512bh columns[kV];
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) {
          columns[v] = __m512bh(_mm512_load_si512(b + v * 2 * kLanes));
        }
#pragma GCC unroll 8
        for (int r = 0; r < kR; ++r) {
          int32_t pair;
          memcpy(&pair, a + r * p.row_stride + i, 4);
          const __m512bh left = __m512bh(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
          for (int v = 0; v < kV; ++v) {
            sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, columns[v]);
          }
        }
      }
    }
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) _mm512_store_ps(c + r * kQueryTile + v * kLanes, sums[r][v]);
    }
  }

  template <int kV>
  static void multiply_lanes(const Product<bf16>& p) {
    int64_t row = 0;
    for (; row + kRows <= p.rows; row += kRows) multiply_rows<kRows, kV>(p, row, 0);
    // 32 keys, or dimensions in multiples of 16: an even number is left.
    if (p.rows - row == 4) multiply_rows<4, kV>(p, row, 0);
    if (p.rows - row == 2) multiply_rows<2, kV>(p, row, 0);
  }

  static void multiply(const Product<bf16>& p) {
    switch (p.queries) {
      case 16: return multiply_lanes<1>(p);
      case 32: return multiply_lanes<2>(p);
      case 48: return multiply_lanes<3>(p);
      case 64: return multiply_lanes<4>(p);
    }
  }
};

}  // namespace
}  // namespace avx512bf16

const BlockAttentionKernels block_attention_bf16_avx512bf16 =
    avx512bf16::kernels_of<avx512bf16::DotEngine>();

}  // namespace ow
