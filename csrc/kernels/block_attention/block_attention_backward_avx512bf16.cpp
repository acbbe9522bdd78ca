// Products of pairs of bf16: weights and ds are rounded to it, as the operands of any product are.
#include "kernels/block_attention/block_attention_avx512bf16.h"
#include "kernels/block_attention/block_attention_backward_body.h"

namespace ow {

const BlockAttentionBackwardKernels block_attention_backward_bf16_avx512bf16 =
    avx512bf16::backward_kernels_of<avx512bf16::DotEngine>();

}  // namespace ow
