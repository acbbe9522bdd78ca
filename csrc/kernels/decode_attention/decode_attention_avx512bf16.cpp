#include "kernels/decode_attention/decode_attention_body.h"

namespace ow {

const DecodeAttentionKernels decode_attention_avx512bf16 = {avx512bf16::attend_any,
                                                            avx512bf16::merge_any};

}  // namespace ow
