#include "kernels/kv_cache/kv_cache_body.h"

namespace ow {

const KVCacheKernels kv_cache_avx512 = {avx512::write_any, avx512::read_any, avx512::move_any,
                                        avx512::bound_any, avx512::score_any};

}  // namespace ow
