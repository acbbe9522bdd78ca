#include "kernels/block_attention/block_attention_backward_body.h"
#include "kernels/block_attention/block_attention_float_body.h"

namespace ow {

const BlockAttentionBackwardKernels block_attention_backward_avx2 =
    avx2::backward_kernels_of<avx2::FloatEngine>();

}  // namespace ow
