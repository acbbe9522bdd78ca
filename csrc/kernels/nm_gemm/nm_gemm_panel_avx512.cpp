#include "kernels/nm_gemm/nm_gemm_panel_body.h"

namespace ow {

const NmGemmKernels nm_gemm_panel_avx512 = {avx512::laid_panel_bytes, avx512::kLanes,
                                            avx512::lay_out_vectors, avx512::multiply_panels};

}  // namespace ow
