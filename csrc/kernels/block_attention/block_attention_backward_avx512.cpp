#include "kernels/block_attention/block_attention_backward_body.h"

namespace ow {

const BlockAttentionBackwardKernels block_attention_backward_avx512{
    avx512::backward_unit_bytes, avx512::backward_scratch_bytes, avx512::pack_backward,
    avx512::backward_tile};

}  // namespace ow
