#include "kernels/block_sparse_gemm/block_sparse_gemm_body.h"

namespace ow {

const BlockSparseGemmKernel block_sparse_gemm_6x16_avx2 = {avx2::run, avx2::kTileRows};

}  // namespace ow
