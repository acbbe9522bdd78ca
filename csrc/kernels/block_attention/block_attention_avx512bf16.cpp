#include "kernels/block_attention/block_attention_avx512bf16.h"

namespace ow {
namespace avx512bf16 {
namespace {

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

  static void multiply(const Product<bf16>& p) { avx512bf16::multiply<DotEngine>(p); }
};

}  // namespace
}  // namespace avx512bf16

const BlockAttentionKernels block_attention_bf16_avx512bf16 =
    avx512bf16::kernels_of<avx512bf16::DotEngine>();

}  // namespace ow
