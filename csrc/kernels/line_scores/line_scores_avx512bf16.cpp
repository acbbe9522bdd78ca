// bf16 keys: a pair of a key's elements, broadcast, times pairs of 64 queries.
#include "kernels/line_scores/line_scores_avx512bf16.h"

namespace ow {
namespace avx512bf16 {
namespace {

struct PairProduct : PairPanel {
  static constexpr int kKeys = 6;

  // Two elements of a key, of which the second may be past its end.
  template <bool kWhole>
  static VecBf16 broadcast_pair(const bf16* k) {
    uint32_t pair = 0;
    memcpy(&pair, k, kWhole ? 4 : 2);
    return {__m512bh(_mm512_set1_epi32(int32_t(pair)))};
  }

  template <int kCount, bool kWhole>
  static void add_pair(const Panel<bf16>& p, const bf16* k, int64_t pair,
                       VecF (&acc)[kCount][kVectors]) {
    const bf16* packed = reinterpret_cast<const bf16*>(p.packed) + pair * kProbePanel * 2;
    VecBf16 line[kVectors];
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) line[u] = load_factors(packed + u * 2 * kLanes);
#pragma GCC unroll 6
    for (int j = 0; j < kCount; ++j) {
      const VecBf16 element = broadcast_pair<kWhole>(k + j * p.k_stride + 2 * pair);
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) acc[j][u] = fma(element, line[u], acc[j][u]);
    }
  }

  template <int kCount>
  static void tile(const Panel<bf16>& p, int64_t key, float* out) {
    const bf16* k = p.k + key * p.k_stride;
    VecF acc[kCount][kVectors];
#pragma GCC unroll 6
    for (int j = 0; j < kCount; ++j) {
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) acc[j][u] = set1(0.0f);
    }
    for (int64_t pair = 0; pair < p.d / 2; ++pair) add_pair<kCount, true>(p, k, pair, acc);
    if (p.d % 2) add_pair<kCount, false>(p, k, p.d / 2, acc);
#pragma GCC unroll 6
    for (int j = 0; j < kCount; ++j) {
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) store(out + j * kProbePanel + u * kLanes, acc[j][u]);
    }
  }

  static void run(const Panel<bf16>& p, int64_t key, int64_t count, float* out) {
    multiply_keys<PairProduct>(p, key, count, out);
  }
};

}  // namespace
}  // namespace avx512bf16

void line_scores_bf16_avx512bf16(const LineScoresArgs& args, float* scratch, int64_t begin,
                                 int64_t end) {
  avx512bf16::score_units<bf16, avx512bf16::PairProduct>(args, scratch, begin, end);
}

}  // namespace ow
