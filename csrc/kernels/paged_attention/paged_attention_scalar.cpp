#include "kernels/paged_attention/paged_attention_body.h"

namespace ow {

const PagedAttentionKernels paged_attention_scalar = {scalar::attend<scalar::Panels>,
                                                      scalar::merge};

}  // namespace ow
