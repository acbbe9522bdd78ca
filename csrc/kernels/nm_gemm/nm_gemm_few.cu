#include "cuda/device.h"

#include "kernels/nm_gemm/nm_gemm_choice_cuda.h"
#include "kernels/nm_gemm/nm_gemm_few_cuda.h"

namespace ow {
namespace {

struct Few {
  const NmGemmArgs& a;
  const NmRows& x;
  int32_t span;
  void* stream;

  template <class Stream, int kXPieces>
  LaunchStatus product() const {
    const dim3 panels{unsigned(div_up(a.n, kNmPanel))};
    return launch("nm_few", nm_few<Stream, kXPieces>, panels, kNmFewThreads, Stream::kSharedBytes,
                  stream, a, x, int32_t(min_of(span, kNmTile)));
  }
  template <class T, int kBits>
  LaunchStatus sparse() const {
    return product<NmSparseStream<T, kBits>, 1>();
  }
  template <class T, int kPieces, int kXPieces>
  LaunchStatus dense() const {
    return product<NmDenseStream<T, kPieces>, kXPieces>();
  }
};

}  // namespace

LaunchStatus launch_nm_few(const NmGemmArgs& a, const NmRows& x, int32_t span, void* stream) {
  return launch_by_operands(a, Few{a, x, span, stream});
}

}  // namespace ow
