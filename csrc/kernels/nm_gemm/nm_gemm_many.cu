#include "cuda/device.h"

#include "kernels/nm_gemm/nm_gemm_choice_cuda.h"
#include "kernels/nm_gemm/nm_gemm_many_cuda.h"

namespace ow {
namespace {

struct Many {
  const NmGemmArgs& a;
  const NmRows& x;
  int32_t span;
  void* stream;

  template <class Tiles, int kXPieces>
  LaunchStatus product() const {
    using Shape = NmManyShape<Tiles, kXPieces>;
    const dim3 blocks{unsigned(div_up(a.n, kNmOutputs) * div_up(a.m, Shape::kTokens))};
    return launch("nm_many", nm_many<Tiles, kXPieces>, blocks, kNmManyThreads, Shape::kSharedBytes,
                  stream, a, x, span);
  }
  template <class T, int kBits>
  LaunchStatus sparse() const {
    return product<NmSparseTiles<T, kBits>, 1>();
  }
  template <class T, int kPieces, int kXPieces>
  LaunchStatus dense() const {
    return product<NmDenseTiles<T, kPieces>, kXPieces>();
  }
};

}  // namespace

LaunchStatus launch_nm_many(const NmGemmArgs& a, const NmRows& x, int32_t span, void* stream) {
  return launch_by_operands(a, Many{a, x, span, stream});
}

}  // namespace ow
