#include "kernels/paged_attention/paged_attention_rows_body.h"

namespace ow {

const PagedAttentionKernels paged_attention_avx2 = {avx2::attend<avx2::FloatSides>, avx2::merge};

}  // namespace ow
