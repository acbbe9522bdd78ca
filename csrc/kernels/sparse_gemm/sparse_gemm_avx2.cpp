#include "kernels/sparse_gemm/sparse_gemm_body.h"

namespace ow {

const SparseGemmKernel sparse_gemm_tokens_avx2 = {avx2::run_tokens<avx2::AddOneByOne>,
                                                  avx2::prepare, avx2::kWidest};
const SampledGemmKernel sampled_gemm_avx2 = {avx2::run_sampled, avx2::prepare, avx2::kWidest};

}  // namespace ow
