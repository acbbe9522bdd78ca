#include "kernels/block_attention/block_attention_avx512bf16.h"

namespace ow {

const BlockAttentionKernels block_attention_bf16_avx512bf16 =
    avx512bf16::kernels_of<avx512bf16::DotEngine>();

}  // namespace ow
