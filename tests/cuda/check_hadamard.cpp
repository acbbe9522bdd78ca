#include "check_family.h"

#include <math.h>

#include "kernels/hadamard/hadamard_cuda.h"

namespace {

void check_hadamard() {
  using namespace ow;
  for (int64_t block = 1; block <= kMaxHadamard; block *= 8) {
    for (const int64_t size : {block, 2 * block}) {
      if (size > kMaxHadamard) continue;
      for (const FloatType type : {FloatType::f32, FloatType::bf16, FloatType::f16}) {
        const int64_t blocks = size > 256 ? 1 : 3;
        const check::Bytes x = check::random_floats(blocks * size, type);
        check::Bytes y(x.size()), want(x.size());
        HadamardArgs args{blocks,   size,        type,
                          x.data(), want.data(), float(1.0 / sqrt(double(size)))};
        hadamard_scalar(args, 0, blocks);
        args.y = y.data();
        check::require(launch_hadamard(args, nullptr));
        check::report("hadamard", long(size), y == want);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) { return ow::check::run(count, arguments, check_hadamard); }
