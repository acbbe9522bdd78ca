#include "ops/hadamard.h"

namespace ow {
namespace {

Tensor hadamard_op(const Tensor& x, int64_t block) {
  return hadamard_by(
      x, block, [](const HadamardArgs& args) { hadamard(args, active_isa(), torch_parallel()); });
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) { m.def(ow::kHadamardSchema); }

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) { m.impl("hadamard", TORCH_BOX(&ow::hadamard_op)); }
