// hadamard between its arguments and a transform: what its operators on the CPU and on a GPU share.
#pragma once

#include <cmath>

#include "kernels/hadamard/hadamard.h"
#include "ops/glue.h"

namespace ow {

constexpr const char* kHadamardSchema = "hadamard(Tensor x, int block) -> Tensor";

// transform(const HadamardArgs&) transforms at least one block.
template <class Transform>
Tensor hadamard_by(const Tensor& x_any, int64_t block, const Transform& transform) {
  constexpr const char* kOp = "hadamard";
  check_float(kOp, "x", x_any);
  OW_CHECK(x_any.dim() >= 1 && x_any.size(-1) >= 1, kOp,
           ": x must have a last dimension of at least 1, got ", shape_text(x_any));
  const int64_t d = x_any.size(-1);
  OW_CHECK(block >= 1 && block <= kMaxHadamard && (block & (block - 1)) == 0 && d % block == 0, kOp,
           ": block must be a power of two up to ", kMaxHadamard,
           " that divides the last dimension of x, ", d, ", got ", block);
  const Tensor x = as_contiguous(x_any);
  Tensor y = empty_with_last(kOp, x, d, x.scalar_type());
  if (x.numel() == 0) return y;
  transform(HadamardArgs{x.numel() / block, block, float_type(x), x.const_data_ptr(),
                         y.mutable_data_ptr(), float(1.0 / std::sqrt(double(block)))});
  return y;
}

}  // namespace ow
