#include "kernels/block_attention/block_attention_backward_body.h"
#include "kernels/block_attention/block_attention_float_body.h"

namespace ow {

const BlockAttentionBackwardKernels block_attention_backward_avx512 =
    avx512::backward_kernels_of<avx512::FloatEngine>();

}  // namespace ow
