#include "kernels/block_attention/block_attention_float_body.h"

namespace ow {

const BlockAttentionKernels block_attention_avx512 = avx512::kernels_of<avx512::FloatEngine>();

}  // namespace ow
