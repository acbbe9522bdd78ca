// The formula, one multiply at a time. Every other tier is tested against this one.
#include "kernels/lowbit_gemm/lowbit_gemm.h"

namespace ow {
namespace {

// The four codes of one lane at k .. k + 3, from a panel.
void codes_at(const uint8_t* panel, int32_t bits, int64_t lane, int64_t k, uint8_t codes[4]) {
  const uint8_t* half =
      panel + k / block_k(bits) * block_bytes(bits) + lane / kHalf * (block_bytes(bits) / 2);
  const int64_t sub = k / 4 % 4;
  for (int64_t b = 0; b < 4; ++b) {
    const int64_t in_line = lane % kHalf * 4 + b;
    if (bits == 8) {
      codes[b] = half[sub * 64 + in_line];
    } else if (bits == 4) {
      codes[b] = (half[sub / 2 * 64 + in_line] >> (sub % 2 * 4)) & 15;
    } else if (bits == 2) {
      codes[b] = (half[in_line] >> (sub * 2)) & 3;
    } else {
      const int64_t j = k / 4 % 8;
      const int code = half[j / 3 * 64 + in_line] >> (j % 3 * 3);
      const int high = half[128 + in_line] >> (6 + j / 3) & 1;
      codes[b] = uint8_t(j % 3 == 2 ? (code & 3) | high << 2 : code & 7);
    }
  }
}

const int8_t* digits_at(const LowbitGemmArgs& a, int64_t r, int64_t k) {
  return static_cast<const int8_t*>(a.x) + element_at(a.x_blocks, r, k);
}

float output(const LowbitGemmArgs& a, int64_t i, int64_t n) {
  const int64_t panel = n / kPanel;
  const int64_t lane = n % kPanel;
  const uint8_t* w = a.w + panel * panel_bytes(a.bits, a.k_padded);
  float total = 0.0f;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t at = (panel * a.groups + g) * kPanel + lane;
    const int32_t minus_zero = a.w_zeros != nullptr ? -int32_t(a.w_zeros[at]) : 1;
    const int64_t end = min_of((g + 1) * a.group_size, a.k);
    int32_t acc[3] = {0, 0, 0};
    for (int64_t k = g * a.group_size; k < end; k += 4) {
      uint8_t codes[4];
      codes_at(w, a.bits, lane, k, codes);
      for (int64_t d = 0; d < a.digits; ++d) {
        const int8_t* x = digits_at(a, i * a.digits + d, k);
        for (int64_t b = 0; b < 4; ++b) acc[d] += int32_t(codes[b]) * x[b];
      }
    }
    for (int64_t d = 0; d < a.digits; ++d) {
      acc[d] += minus_zero * a.x_sums[(i * a.digits + d) * a.groups + g];
    }
    float sum = float(acc[0]);
    if (a.digits == 3) {
      const float low = __builtin_fmaf(float(acc[1]), 256.0f, float(acc[2]));
      sum = __builtin_fmaf(sum, 65536.0f, low) * a.x_scales[i * a.groups + g];
    }
    total = __builtin_fmaf(sum, read_float(a.w_scales, a.w_scales_type, at), total);
  }
  return a.digits == 1 ? total * a.x_scales[i] : total;
}

}  // namespace

void lowbit_gemm_rows_scalar(const LowbitGemmArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t n = begin * kPanel; n < min_of(end * kPanel, a.n); ++n) {
      float value = output(a, i, n);
      if (a.bias != nullptr) value += read_float(a.bias, a.y_type, n);
      if (a.add != nullptr) value += read_float(a.add, a.y_type, i * a.n + n);
      write_float(a.y, a.y_type, i * a.n + n, value);
    }
  }
}

}  // namespace ow
