#include "kernels/quantize/quantize_body.h"

namespace ow {

void encode_rows_avx2(const EncodeArgs& args, int64_t begin, int64_t end) {
  avx2::encode_rows_any(args, begin, end);
}

}  // namespace ow
