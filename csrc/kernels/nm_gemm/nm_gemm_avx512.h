// What the kernels of several files of the tier share.
#pragma once

#include "kernels/nm_gemm/nm_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

// Index lines with one lane an output.
class LaneSpread {
 public:
  explicit LaneSpread(int32_t vector)
      : line_bytes_(nm_index_lanes(vector) * 4),
        mask_(__mmask16((1u << nm_index_lanes(vector)) - 1)) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i lanes = _mm512_set1_epi32(int(nm_index_lanes(vector)));
    spread_ = _mm512_srli_epi32(_mm512_mullo_epi32(lane, lanes), 4);
  }
  // The i-th line of a unit's index.
  __m512i line(const uint8_t* index, int64_t i) const {
    const __m512i lanes = _mm512_maskz_loadu_epi32(mask_, index + i * line_bytes_);
    return _mm512_permutexvar_epi32(spread_, lanes);
  }

 private:
  int64_t line_bytes_;
  __mmask16 mask_;
  __m512i spread_;
};

}  // namespace
}  // namespace ow::OW_TARGET
