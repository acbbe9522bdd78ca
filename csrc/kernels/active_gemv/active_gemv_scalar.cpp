#include "kernels/active_gemv/active_gemv_body.h"

namespace ow {

void active_gemv_scalar(const ActiveGemvArgs& args, int64_t begin, int64_t end) {
  scalar::run(args, begin, end);
}

}  // namespace ow
