#include "kernels/paged_attention/paged_attention_avx512.h"

namespace ow {

const PagedAttentionKernels paged_attention_avx512bf16 = {avx512bf16::attend_products,
                                                          avx512bf16::merge};

}  // namespace ow
