#include "ops/hadamard.h"

#include "kernels/hadamard/hadamard_cuda.h"
#include "ops/cuda/device.h"

namespace ow {
namespace {

Tensor hadamard_op(const Tensor& x, int64_t block) {
  constexpr const char* kOp = "hadamard";
  check_operands(kOp, {{"x", &x}});
  return hadamard_by(x, block, [&](const HadamardArgs& args) {
    const Device device(kOp, "x", x);
    device.check(launch_hadamard(args, device.stream()));
  });
}

}  // namespace
}  // namespace ow

OW_DEVICE_OPERATOR("hadamard", ow::kHadamardSchema, &ow::hadamard_op)
