#include "kernels/block_scores/block_scores_body.h"

namespace ow {

const BlockScoresKernels block_scores_scalar = {scalar::means_any, scalar::sample_any,
                                                scalar::pack_any, scalar::score};

}  // namespace ow
