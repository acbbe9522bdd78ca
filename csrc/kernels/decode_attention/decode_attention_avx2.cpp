#include "kernels/decode_attention/decode_attention_body.h"

namespace ow {

const DecodeAttentionKernels decode_attention_avx2 = {avx2::attend_any, avx2::merge_any};

}  // namespace ow
