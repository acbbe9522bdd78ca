#include "kernels/sparse_gemm/sparse_gemm_bytes_body.h"

namespace ow {

const SparseGemmKernel sparse_gemm_tokens_avx2 = {avx2::run_tokens<avx2::AddOneByOne>,
                                                  avx2::prepare, avx2::kWidest};
const SparseGemmKernel sparse_gemm_bytes_avx2 = {avx2::run_bytes<avx2::AddByteByByte>,
                                                 avx2::prepare, avx2::kBytesTokens};
const SampledGemmKernel sampled_gemm_avx2 = {avx2::run_sampled, avx2::prepare, avx2::kWidest};

}  // namespace ow
