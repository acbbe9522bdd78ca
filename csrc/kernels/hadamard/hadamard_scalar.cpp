#include "kernels/hadamard/hadamard_body.h"

namespace ow {

void hadamard_scalar(const HadamardArgs& args, int64_t begin, int64_t end) {
  scalar::transform(args, begin, end);
}

}  // namespace ow
