#include "kernels/active_gemv/active_gemv_body.h"

namespace ow {

void active_gemv_avx2(const ActiveGemvArgs& args, int64_t begin, int64_t end) {
  avx2::run(args, begin, end);
}

}  // namespace ow
