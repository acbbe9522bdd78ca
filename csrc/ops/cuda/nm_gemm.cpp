#include "ops/nm_gemm.h"
#include "kernels/nm_gemm/nm_gemm_cuda.h"
#include "kernels/quantize/quantize_cuda.h"
#include "ops/cuda/device.h"
#include "ops/values.h"

namespace ow {
namespace {

Tensor nm_linear(const Tensor& x, const Tensor& values, const Tensor& index,
                 const std::optional<Tensor>& scales, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& add, int64_t layout, int64_t n, int64_t k,
                 int64_t kept, int64_t block, int64_t vector, int64_t group_size, int64_t compute) {
  constexpr const char* kOp = "nm_linear";
  check_operands(kOp, {{"x", &x},
                       {"values", &values},
                       {"index", &index},
                       {"scales", or_null(scales)},
                       {"bias", or_null(bias)},
                       {"add", or_null(add)}});
  const auto multiply = [&](NmGemmArgs& args) {
    check_aligned(kOp, "values", values);
    check_aligned(kOp, "index", index);
    if (scales.has_value()) check_aligned(kOp, "scales", *scales);
    const Device device(kOp, "x", x);
    // Given back when this returns, to the stream that the kernels run on.
    std::optional<Tensor> codes, scales_of_rows, laid;
    if (args.int8) {
      codes = fast_empty({args.m, k}, ScalarType::Char, place_of(x));
      scales_of_rows = fast_empty({args.m}, ScalarType::Float, place_of(x));
      const EncodeArgs encode =
          nm_encode_args(args, static_cast<int8_t*>(codes->mutable_data_ptr()),
                         static_cast<float*>(scales_of_rows->mutable_data_ptr()));
      device.check(launch_encode_rows(encode, device.stream()));
      args.x = encode.codes;
      args.x_scales = encode.scales;
    }
    if (const int64_t bytes = nm_cuda_laid_bytes(args); bytes != 0) {
      laid = fast_empty({bytes}, ScalarType::Byte, place_of(x));
      args.laid = laid->mutable_data_ptr();
    }
    device.check(launch_nm_gemm(args, device.stream()));
  };
  return nm_linear_by(x, values, index, or_null(scales), or_null(bias), or_null(add), layout, n, k,
                      kept, block, vector, group_size, compute, multiply);
}

// As the CPU's operator checks on the host.
void check_values(const char* op, const NmPackArgs& args, const Tensor& weight,
                  const Tensor* scales) {
  const Device device(op, "weight", weight);
  Tensor scratch = fast_empty({int64_t(sizeof(NmFaults))}, ScalarType::Byte, place_of(weight));
  NmFaults faults{};
  device.check(launch_find_nm_faults(args, scales == nullptr ? FloatType::f32 : float_type(*scales),
                                     scratch.mutable_data_ptr(), &faults, device.stream()));
  if (faults.code != kNmFaultless) fail_code(op, "weight", args.bits, int(faults.code & 0xff));
  if (faults.scale != kNmFaultless) {
    fail_scale(op, bits_to_float(uint32_t(faults.scale)), int64_t(faults.scale >> 32));
  }
  if (faults.excess == kNmFaultless) return;
  const int64_t at = int64_t(faults.excess >> 8);
  const int64_t blocks = div_up(args.k, args.block);
  fail_nm_excess(
      op, args,
      {at / blocks * args.vector, at % blocks * args.block, int64_t(faults.excess & 0xff)});
}

std::tuple<Tensor, Tensor, Tensor> compress_nm_op(const Tensor& weight,
                                                  const std::optional<Tensor>& mask,
                                                  const std::optional<Tensor>& scales, int64_t kept,
                                                  int64_t block, int64_t vector, int64_t bits,
                                                  int64_t group_size) {
  constexpr const char* kOp = "compress_nm";
  check_operands(kOp, {{"weight", &weight}, {"mask", or_null(mask)}, {"scales", or_null(scales)}});
  const auto check = [&](const NmPackArgs& args, const Tensor& checked, const Tensor* grid) {
    check_values(kOp, args, checked, grid);
  };
  const auto pack = [&](const NmPackArgs& args, void* values, uint8_t* index, void* packed_scales) {
    const Device device(kOp, "weight", weight);
    device.check(launch_compress_nm(args, values, index, packed_scales, device.stream()));
  };
  return compress_nm_by(weight, or_null(mask), or_null(scales), kept, block, vector, bits,
                        group_size, check, pack);
}

std::tuple<Tensor, Tensor> expand_nm_op(const Tensor& values, const Tensor& index,
                                        const std::optional<Tensor>& scales, int64_t layout,
                                        int64_t n, int64_t k, int64_t kept, int64_t block,
                                        int64_t vector, int64_t group_size) {
  constexpr const char* kOp = "expand_nm";
  check_operands(kOp, {{"values", &values}, {"index", &index}, {"scales", or_null(scales)}});
  const auto expand = [&](const NmPackArgs& args, const void* packed, const uint8_t* lanes,
                          const void* packed_scales, void* weight, void* flat_scales) {
    const Device device(kOp, "values", values);
    device.check(
        launch_expand_nm(args, packed, lanes, packed_scales, weight, flat_scales, device.stream()));
  };
  return expand_nm_by(values, index, or_null(scales), layout, n, k, kept, block, vector, group_size,
                      expand);
}

}  // namespace
}  // namespace ow

OW_DEVICE_OPERATOR("nm_linear", ow::kNmLinearSchema, &ow::nm_linear)
OW_DEVICE_OPERATOR("compress_nm", ow::kCompressNmSchema, &ow::compress_nm_op)
OW_DEVICE_OPERATOR("expand_nm", ow::kExpandNmSchema, &ow::expand_nm_op)
