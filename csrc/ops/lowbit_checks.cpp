#include "ops/linear.h"
#include "ops/lowbit_linear.h"

namespace ow {

const LayoutInfo* check_layout(const char* op, int64_t layout) {
  const LayoutInfo* info = layout_info(layout);
  OW_CHECK(info != nullptr && info->family == LayoutFamily::lowbit, op,
           ": layout must be one this build reads, got id ", layout,
           "; re-pack with openwork.pack_lowbit");
  OW_CHECK(info->bits != 0, op, ": layout must be that of a low-bit weight, got ", info->text);
  return info;
}

LowbitWeight check_lowbit_geometry(const char* op, const LayoutInfo* layout, int64_t n, int64_t k,
                                   int64_t group_size) {
  check_weight_size(op, n, k);
  OW_CHECK(group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128 ||
               group_size == k,
           op, ": group_size must be 16, 32, 64, 128 or k = ", k, ", got ", group_size);
  OW_CHECK(group_size <= kMaxGroup, op, ": one group a row takes k up to ", kMaxGroup, ", got ", k,
           "; use a smaller group_size");
  return {layout, n, k, round_up(k, kPadK), div_up(n, kPanel), group_size, div_up(k, group_size)};
}

void check_lowbit_tensors(const char* op, const LowbitWeight& w, const Tensor& packed,
                          const Tensor& scales, const Tensor* zeros) {
  check_dtype(op, "packed", packed, ScalarType::Byte);
  const int64_t blocks = w.k_padded / block_k(w.layout->bits);
  const int64_t lines = block_bytes(w.layout->bits) / 128;
  check_shape(op, "packed", packed, {w.panels, blocks, 2, lines, kHalf, 4});
  check_contiguous(op, "packed", packed);
  check_float(op, "scales", scales);
  check_shape(op, "scales", scales, {w.panels, w.groups, kPanel});
  check_contiguous(op, "scales", scales);
  if (zeros != nullptr) {
    check_operand(op, "zeros", *zeros, ScalarType::Byte, {w.panels, w.groups, kPanel});
  }
}

void check_compute(const char* op, int64_t compute) {
  OW_CHECK(compute == kComputeFloat || compute == kComputeInt8, op,
           ": compute must be 0 (float) or 1 (int8), got ", compute);
}

}  // namespace ow
