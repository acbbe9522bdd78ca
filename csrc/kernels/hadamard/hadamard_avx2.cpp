#include "kernels/hadamard/hadamard_body.h"

namespace ow {

void hadamard_avx2(const HadamardArgs& args, int64_t begin, int64_t end) {
  avx2::transform(args, begin, end);
}

}  // namespace ow
