#include "kernels/hadamard/hadamard_body.h"

namespace ow {

void hadamard_avx512(const HadamardArgs& args, int64_t begin, int64_t end) {
  avx512::transform(args, begin, end);
}

}  // namespace ow
