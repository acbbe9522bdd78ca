// The formula, one multiply at a time. Every other tier is tested against this one.
#include "kernels/nm_gemm/nm_gemm_body.h"

namespace ow {
namespace scalar {
namespace {

// The stored number of a slot, without its scale.
float stored_at(const NmGemmArgs& a, int64_t panel, int64_t lane, int64_t slot) {
  const uint8_t* values = nm_unit_values(a, panel, slot / kNmUnit);
  const int64_t s = slot % kNmUnit;
  return a.bits <= 8 ? float(nm_code_at(values, a.bits, lane, s))
                     : nm_float_at(values, a.bits, lane, s);
}

int64_t column_at(const NmGemmArgs& a, int64_t panel, int64_t lane, int64_t slot) {
  const uint8_t* index = nm_unit_index(a, panel, slot / kNmUnit);
  return slot / a.kept * a.block + nm_index_at(index, a.block, a.vector, lane, slot % kNmUnit);
}

float scale_at(const NmGemmArgs& a, int64_t panel, int64_t lane, int64_t g) {
  return a.scales == nullptr
             ? 1.0f
             : read_float(a.scales, a.scales_type, (panel * a.groups + g) * kNmPanel + lane);
}

float output(const NmGemmArgs& a, int64_t i, int64_t n) {
  const int64_t panel = n / kNmPanel;
  const int64_t lane = n % kNmPanel;
  const int64_t slots = nm_slots(a.k, a.kept, a.block);
  const float* x = static_cast<const float*>(a.laid) + i * nm_columns(a);
  float total = 0.0f;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t g = slot / a.kept * a.block / a.group_size;
    const float w = stored_at(a, panel, lane, slot) * scale_at(a, panel, lane, g);
    total = __builtin_fmaf(x[column_at(a, panel, lane, slot)], w, total);
  }
  return total;
}

float output_int8(const NmGemmArgs& a, int64_t i, int64_t n) {
  const int64_t panel = n / kNmPanel;
  const int64_t lane = n % kNmPanel;
  const int64_t blocks = div_up(a.k, a.block);
  const int64_t group_blocks = a.groups == 1 ? blocks : a.group_size / a.block;
  const uint8_t* x = laid_codes(a, i);
  float total = 0.0f;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t end = min_of((g + 1) * group_blocks, blocks) * a.kept;
    int32_t sum = 0;
    for (int64_t slot = g * group_blocks * a.kept; slot < end; ++slot) {
      const int32_t code = x[column_at(a, panel, lane, slot)] - 128;
      sum += code * int32_t(stored_at(a, panel, lane, slot));
    }
    total = __builtin_fmaf(float(sum), scale_at(a, panel, lane, g), total);
  }
  return total * a.x_scales[i];
}

void multiply(const NmGemmArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t n = begin * kNmPanel; n < min_of(end * kNmPanel, a.n); ++n) {
      float value = a.int8 ? output_int8(a, i, n) : output(a, i, n);
      if (a.bias != nullptr) value += read_float(a.bias, a.y_type, n);
      if (a.add != nullptr) value += read_float(a.add, a.y_type, i * a.n + n);
      write_float(a.y, a.y_type, i * a.n + n, value);
    }
  }
}

}  // namespace
}  // namespace scalar

const NmGemmKernels nm_gemm_scalar = {scalar::laid_row_bytes, 1, scalar::lay_out_rows,
                                      scalar::multiply};

}  // namespace ow
