#include "kernels/kv_cache/kv_cache_body.h"

namespace ow {

const KVCacheKernels kv_cache_scalar = {scalar::write_any, scalar::read_any, scalar::move_any,
                                        scalar::bound_any, scalar::score_any};

}  // namespace ow
