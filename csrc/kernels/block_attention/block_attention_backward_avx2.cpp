#include "kernels/block_attention/block_attention_backward_body.h"

namespace ow {

const BlockAttentionBackwardKernels block_attention_backward_avx2{
    avx2::backward_unit_bytes, avx2::backward_scratch_bytes, avx2::pack_backward,
    avx2::backward_tile};

}  // namespace ow
