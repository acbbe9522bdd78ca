#include "kernels/decode_attention/decode_attention_body.h"

namespace ow {

const DecodeAttentionKernels decode_attention_scalar = {scalar::attend_any, scalar::merge_any};

}  // namespace ow
