#include "kernels/block_attention/block_attention_backward_body.h"

namespace ow {

const BlockAttentionBackwardKernels block_attention_backward_scalar{
    scalar::backward_unit_bytes, scalar::backward_scratch_bytes, scalar::pack_backward,
    scalar::backward_tile};

}  // namespace ow
