#include "kernels/block_sparse_gemm/block_sparse_gemm_body.h"

namespace ow {

const BlockSparseGemmKernel block_sparse_gemm_14x32_avx512 = {avx512::run, avx512::kTileRows};

}  // namespace ow
