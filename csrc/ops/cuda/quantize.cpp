#include "kernels/quantize/quantize_cuda.h"
#include "ops/cuda/device.h"
#include "ops/quantize_rows.h"

namespace ow {
namespace {

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x) {
  constexpr const char* kOp = "quantize_rows";
  check_operands(kOp, {{"x", &x}});
  return quantize_rows_by(x, [&](const EncodeArgs& args) {
    const Device device(kOp, "x", x);
    device.check(launch_encode_rows(args, device.stream()));
  });
}

}  // namespace
}  // namespace ow

OW_DEVICE_OPERATOR("quantize_rows", ow::kQuantizeRowsSchema, &ow::quantize_rows)
