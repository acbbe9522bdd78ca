#include "kernels/block_scores/block_scores_body.h"

namespace ow {

const BlockScoresKernels block_scores_avx512 = {avx512::means_any, avx512::sample_any,
                                                avx512::pack_any, avx512::score};

}  // namespace ow
