#include "kernels/decode_attention/decode_attention_body.h"

namespace ow {

const DecodeAttentionKernels decode_attention_avx512 = {avx512::attend_any, avx512::merge_any};

}  // namespace ow
