#include "kernels/block_attention/block_attention_float_body.h"

namespace ow {

const BlockAttentionKernels block_attention_avx2 = avx2::kernels_of<avx2::FloatEngine>();

}  // namespace ow
