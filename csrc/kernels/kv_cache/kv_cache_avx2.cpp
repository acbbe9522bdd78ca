#include "kernels/kv_cache/kv_cache_body.h"

namespace ow {

const KVCacheKernels kv_cache_avx2 = {avx2::write_any, avx2::read_any, avx2::move_any,
                                      avx2::bound_any, avx2::score_any};

}  // namespace ow
