#include "kernels/quantize/quantize_body.h"

namespace ow {

void encode_rows_scalar(const EncodeArgs& args, int64_t begin, int64_t end) {
  scalar::encode_rows_any(args, begin, end);
}

}  // namespace ow
