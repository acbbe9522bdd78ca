#include "kernels/nm_gemm/nm_gemm_panel_body.h"

namespace ow {

const NmGemmKernels nm_gemm_panel_avx2 = {avx2::laid_panel_bytes, avx2::kLanes,
                                          avx2::lay_out_vectors, avx2::multiply_panels};

}  // namespace ow
