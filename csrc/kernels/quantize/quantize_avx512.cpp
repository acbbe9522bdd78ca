#include "kernels/quantize/quantize_body.h"

namespace ow {

void encode_rows_avx512(const EncodeArgs& args, int64_t begin, int64_t end) {
  avx512::encode_rows_any(args, begin, end);
}

}  // namespace ow
