#include "kernels/paged_attention/paged_attention_avx512.h"

namespace ow {

const PagedAttentionKernels paged_attention_avx512 = {avx512::attend_products, avx512::merge};

}  // namespace ow
