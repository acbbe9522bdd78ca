// Which kernel computes a product: by the operands' types, and by the pattern.
//
//   x               weight                     tensor core            x in pieces   w in pieces
//   fp16            fp16, int8, int4           fp16, sparse if 2:4    1             1
//   bf16, int8      bf16, int8, int4           bf16, sparse if 2:4    1             1
//   bf16            fp32, fp16                 bf16                   1             3
//   fp32, or fp16   bf16, int8, int4           bf16                   3             1
//   beside others   fp32, fp16                 bf16                   3             3
//
// int8 x times codes is exact in bf16 and its fp32 sums: half as fast as the s8 instructions would
// be, where many rows are multiplied, and the same kernels.
#pragma once

#include "cuda/device.h"

#include "core/types.h"
#include "cuda/launch.h"
#include "kernels/nm_gemm/nm_gemm.h"
#include "kernels/nm_gemm/nm_gemm_weights_cuda.h"

namespace ow {

inline bool nm_has_f16_values(const NmGemmArgs& a) {
  return a.bits == 16 && a.value_type == FloatType::f16;
}
inline bool nm_multiplies_f16(const NmGemmArgs& a) {
  return !a.int8 && a.y_type == FloatType::f16 && (a.bits <= 8 || nm_has_f16_values(a));
}
inline int nm_x_pieces(const NmGemmArgs& a) {
  return a.int8 || a.y_type == FloatType::bf16 || nm_multiplies_f16(a) ? 1 : 3;
}

// Calls launch.sparse<T, bits>() or launch.dense<T, pieces of w, pieces of x>().
template <class Launch>
LaunchStatus launch_by_operands(const NmGemmArgs& a, const Launch& launch) {
  const bool sparse = a.kept == 2 && a.block == 4;
  if (nm_multiplies_f16(a)) {
    if (!sparse) return launch.template dense<f16, 1, 1>();
    switch (a.bits) {
      case 4: return launch.template sparse<f16, 4>();
      case 8: return launch.template sparse<f16, 8>();
      default: return launch.template sparse<f16, 16>();
    }
  }
  const bool w_in_pieces = a.bits == 32 || nm_has_f16_values(a);
  if (nm_x_pieces(a) == 3) {
    return w_in_pieces ? launch.template dense<bf16, 3, 3>() : launch.template dense<bf16, 1, 3>();
  }
  if (w_in_pieces) return launch.template dense<bf16, 3, 1>();
  if (!sparse) return launch.template dense<bf16, 1, 1>();
  switch (a.bits) {
    case 4: return launch.template sparse<bf16, 4>();
    case 8: return launch.template sparse<bf16, 8>();
    default: return launch.template sparse<bf16, 16>();
  }
}

// Of few and of many rows of x (nm_gemm_few.cu, nm_gemm_many.cu); groups are scaled every `span`
// columns.
LaunchStatus launch_nm_few(const NmGemmArgs& a, const NmRows& x, int32_t span, void* stream);
LaunchStatus launch_nm_many(const NmGemmArgs& a, const NmRows& x, int32_t span, void* stream);

}  // namespace ow
