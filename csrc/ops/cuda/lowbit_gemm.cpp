#include "kernels/lowbit_gemm/lowbit_gemm_cuda.h"
#include "kernels/quantize/quantize_cuda.h"
#include "ops/cuda/device.h"
#include "ops/lowbit_weight.h"
#include "ops/values.h"

namespace ow {
namespace {

// Of a whole number of blocks a row, and where a block can be copied from.
bool is_laid_out(const Tensor& x, int64_t k) {
  constexpr uintptr_t kAlignment = 16;
  return k % kPadK == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0;
}

Tensor lowbit_linear(const Tensor& x_any, const Tensor& packed, const Tensor& scales,
                     const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& add, int64_t layout, int64_t n, int64_t k,
                     int64_t group_size, int64_t compute) {
  constexpr const char* kOp = "lowbit_linear";
  check_operands(kOp, {{"x", &x_any},
                       {"packed", &packed},
                       {"scales", &scales},
                       {"zeros", or_null(zeros)},
                       {"bias", or_null(bias)},
                       {"add", or_null(add)}});
  const auto multiply = [&](const LowbitWeight& w, const Tensor& x, int64_t m, Tensor& y) {
    check_aligned(kOp, "packed", packed);
    check_aligned(kOp, "scales", scales);
    if (zeros.has_value()) check_aligned(kOp, "zeros", *zeros);
    const Device device(kOp, "x", x);
    const Place place = place_of(x);
    LowbitGemmArgs args{};
    args.m = m;
    args.n = n;
    args.k = k;
    args.k_padded = w.k_padded;
    args.group_size = group_size;
    args.groups = w.groups;
    args.bits = w.layout->bits;
    args.digits = compute == kComputeInt8 ? 1 : x.scalar_type() == ScalarType::Float ? 3 : 0;
    args.x_blocks = lowbit_gemm_cuda_x_blocks(k);
    args.w = static_cast<const uint8_t*>(packed.const_data_ptr());
    args.w_scales = scales.const_data_ptr();
    args.w_scales_type = float_type(scales);
    args.w_zeros = static_cast<const uint8_t*>(const_data(or_null(zeros)));
    args.bias = const_data(or_null(bias));
    args.add = const_data(or_null(add));
    args.y = y.mutable_data_ptr();
    args.y_type = float_type(x);
    // Given back when this returns, to the stream that the kernels run on.
    std::optional<Tensor> rows, row_scales, parts;
    if (args.digits != 0) {
      const int64_t scale_count = args.digits == 3 ? m * w.groups : m;
      rows = fast_empty({m * args.digits, w.k_padded}, ScalarType::Char, place);
      row_scales = fast_empty({scale_count}, ScalarType::Float, place);
      EncodeArgs encode{};
      encode.m = m;
      encode.k = encode.stride_x = k;
      encode.group_size = group_size;
      encode.digits = args.digits;
      encode.blocks = args.x_blocks;
      encode.x_type = args.y_type;
      encode.x = x.const_data_ptr();
      encode.codes = static_cast<int8_t*>(rows->mutable_data_ptr());
      encode.scales = static_cast<float*>(row_scales->mutable_data_ptr());
      device.check(launch_encode_rows(encode, device.stream()));
      args.x = encode.codes;
      args.x_scales = encode.scales;
    } else if (is_laid_out(x, k)) {
      args.x = x.const_data_ptr();
    } else {
      rows = fast_empty({m, w.k_padded}, x.scalar_type(), place);
      device.check(
          launch_pad_rows(x.const_data_ptr(), m, k, rows->mutable_data_ptr(), device.stream()));
      args.x = rows->const_data_ptr();
    }
    const int count = multiprocessors(place.device_index);
    parts = fast_empty({lowbit_gemm_part_count(args, count)}, ScalarType::Float, place);
    device.check(launch_lowbit_gemm(args, count, static_cast<float*>(parts->mutable_data_ptr()),
                                    device.stream()));
  };
  return lowbit_linear_by(x_any, packed, scales, zeros, bias, add, layout, n, k, group_size,
                          compute, multiply);
}

Tensor lowbit_embedding(const Tensor& ids, const Tensor& packed, const Tensor& scales,
                        const std::optional<Tensor>& zeros, int64_t layout, int64_t n, int64_t k,
                        int64_t group_size, ScalarType dtype) {
  constexpr const char* kOp = "lowbit_embedding";
  check_operands(
      kOp, {{"ids", &ids}, {"packed", &packed}, {"scales", &scales}, {"zeros", or_null(zeros)}});
  return lowbit_embedding_by(ids, packed, scales, zeros, layout, n, k, group_size, dtype,
                             [&](const LowbitRowsArgs& args) {
                               const Device device(kOp, "packed", packed);
                               device.check(launch_lowbit_rows(args, n, device.stream()));
                             });
}

// As the CPU's operator checks on the host.
void check_values(const LowbitPackArgs& args, const Tensor& codes, const Tensor& scales,
                  const Tensor* zeros) {
  constexpr const char* kOp = "pack_lowbit";
  const Device device(kOp, "codes", codes);
  Tensor scratch = fast_empty({int64_t(sizeof(LowbitFaults))}, ScalarType::Byte, place_of(codes));
  LowbitFaults faults{};
  device.check(launch_find_lowbit_faults(args, static_cast<const uint8_t*>(codes.const_data_ptr()),
                                         scales.const_data_ptr(), float_type(scales),
                                         static_cast<const uint8_t*>(const_data(zeros)),
                                         scratch.mutable_data_ptr(), &faults, device.stream()));
  if (faults.code != kLowbitFaultless) fail_code(kOp, "codes", args.bits, int(faults.code & 0xff));
  if (faults.scale != kLowbitFaultless) {
    fail_scale(kOp, bits_to_float(uint32_t(faults.scale)), int64_t(faults.scale >> 32));
  }
  if (faults.zero != kLowbitFaultless) fail_code(kOp, "zeros", args.bits, int(faults.zero & 0xff));
}

LowbitTensors pack_lowbit_op(const Tensor& codes, const Tensor& scales,
                             const std::optional<Tensor>& zeros, int64_t bits, int64_t group_size) {
  constexpr const char* kOp = "pack_lowbit";
  check_operands(kOp, {{"codes", &codes}, {"scales", &scales}, {"zeros", or_null(zeros)}});
  return pack_lowbit_by(codes, scales, zeros, bits, group_size, check_values,
                        [&](const auto&... pack) {
                          const Device device(kOp, "codes", codes);
                          device.check(launch_pack_lowbit(pack..., device.stream()));
                        });
}

LowbitTensors unpack_lowbit_op(const Tensor& packed, const Tensor& scales,
                               const std::optional<Tensor>& zeros, int64_t layout, int64_t n,
                               int64_t k, int64_t group_size) {
  constexpr const char* kOp = "unpack_lowbit";
  check_operands(kOp, {{"packed", &packed}, {"scales", &scales}, {"zeros", or_null(zeros)}});
  return unpack_lowbit_by(packed, scales, zeros, layout, n, k, group_size,
                          [&](const auto&... unpack) {
                            const Device device(kOp, "packed", packed);
                            device.check(launch_unpack_lowbit(unpack..., device.stream()));
                          });
}

}  // namespace
}  // namespace ow

OW_DEVICE_OPERATOR("lowbit_linear", ow::kLowbitLinearSchema, &ow::lowbit_linear)
OW_DEVICE_OPERATOR("lowbit_embedding", ow::kLowbitEmbeddingSchema, &ow::lowbit_embedding)
OW_DEVICE_OPERATOR("pack_lowbit", ow::kPackLowbitSchema, &ow::pack_lowbit_op)
OW_DEVICE_OPERATOR("unpack_lowbit", ow::kUnpackLowbitSchema, &ow::unpack_lowbit_op)
