#include "kernels/block_scores/block_scores_body.h"

namespace ow {

const BlockScoresKernels block_scores_avx2 = {avx2::means_any, avx2::sample_any, avx2::pack_any,
                                              avx2::score};

}  // namespace ow
