// What the products of bf16 share: queries in pairs of elements.
#pragma once

#include "kernels/line_scores/line_scores_body.h"

namespace ow::OW_TARGET {
namespace {

// packed is [depth / 2, 64, 2], zero past d and past the rows.
struct PairPanel {
  static int64_t depth(const Panel<bf16>& p) { return round_up(p.d, kProbeDepth); }

  static void pack(const Panel<bf16>& p) {
    bf16* packed = reinterpret_cast<bf16*>(p.packed);
    memset(packed, 0, size_t(depth(p) * kProbePanel) * sizeof(bf16));
    for (int64_t l = 0; l < p.rows; ++l) {
      for (int64_t i = 0; i < p.d; ++i) {
        packed[(i / 2 * kProbePanel + l) * 2 + i % 2] = p.q[l * p.q_stride + i];
      }
    }
  }
};

}  // namespace
}  // namespace ow::OW_TARGET
