#include "kernels/block_attention/block_attention_backward_body.h"
#include "kernels/block_attention/block_attention_float_body.h"

namespace ow {

const BlockAttentionBackwardKernels block_attention_backward_scalar =
    scalar::backward_kernels_of<scalar::FloatEngine>();

}  // namespace ow
