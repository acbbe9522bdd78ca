#include "ops/lowbit_linear.h"

#include <tuple>

#include "ops/quantize_rows.h"
#include "ops/values.h"

namespace ow {

LowbitLinear::LowbitLinear(const LowbitWeight& w, const Tensor& packed, const Tensor& scales,
                           const Tensor* zeros, const Tensor* bias, int64_t compute, int64_t rows,
                           FloatType x_type)
    : isa_(active_isa()), gemm_{} {
  const bool as_bf16 =
      compute == kComputeFloat && x_type == FloatType::bf16 && lowbit_gemm_takes_bf16(isa_, rows);
  gemm_.m = rows;
  gemm_.n = w.n;
  gemm_.k = w.k;
  gemm_.k_padded = w.k_padded;
  gemm_.group_size = w.group_size;
  gemm_.groups = w.groups;
  gemm_.bits = w.layout->bits;
  gemm_.digits = as_bf16 ? 0 : compute == kComputeInt8 ? 1 : 3;
  gemm_.x_blocks = lowbit_gemm_x_blocks(isa_, rows, gemm_.digits, w.k);
  gemm_.w = static_cast<const uint8_t*>(packed.const_data_ptr());
  gemm_.w_scales = scales.const_data_ptr();
  gemm_.w_scales_type = float_type(scales);
  gemm_.w_zeros = static_cast<const uint8_t*>(const_data(zeros));
  gemm_.bias = const_data(bias);
  gemm_.y_type = x_type;
}

int64_t LowbitLinear::code_bytes() const {
  if (gemm_.digits == 0) return element_count(gemm_.x_blocks, gemm_.m) * 2;
  return element_count(gemm_.x_blocks, gemm_.m * gemm_.digits);
}
int64_t LowbitLinear::scale_count() const {
  return gemm_.digits == 3 ? gemm_.m * gemm_.groups : gemm_.m;
}
int64_t LowbitLinear::sum_count() const { return gemm_.m * gemm_.digits * gemm_.groups; }

int64_t LowbitLinear::scratch_bytes() const {
  return Scratch::bytes_for(code_bytes()) + Scratch::bytes_for(scale_count() * 4) +
         Scratch::bytes_for(sum_count() * 4);
}

void LowbitLinear::run(const void* x, const void* add, void* y, Scratch scratch,
                       const Parallel& parallel) const {
  LowbitGemmArgs args = gemm_;
  args.add = add;
  args.y = y;
  if (gemm_.digits == 0) {
    bf16* rows = scratch.take<bf16>(code_bytes() / 2);
    block_bf16_rows(static_cast<const bf16*>(x), gemm_.m, gemm_.k, gemm_.x_blocks, rows, parallel);
    args.x = rows;
    return lowbit_gemm(args, isa_, parallel);
  }
  EncodeArgs encode{};
  encode.m = gemm_.m;
  encode.k = gemm_.k;
  encode.group_size = gemm_.group_size;
  encode.digits = gemm_.digits;
  encode.blocks = gemm_.x_blocks;
  encode.sum_factor = lowbit_sum_factor(gemm_.bits, gemm_.w_zeros == nullptr);
  encode.x_type = gemm_.y_type;
  encode.x = x;
  encode.stride_x = gemm_.k;
  encode.codes = scratch.take<int8_t>(code_bytes());
  encode.scales = scratch.take<float>(scale_count());
  encode.sums = scratch.take<int32_t>(sum_count());
  encode_rows(encode, isa_, parallel);
  args.x = encode.codes;
  args.x_scales = encode.scales;
  args.x_sums = encode.sums;
  lowbit_gemm(args, isa_, parallel);
}

namespace {

Tensor lowbit_linear(const Tensor& x_any, const Tensor& packed, const Tensor& scales,
                     const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& add, int64_t layout, int64_t n, int64_t k,
                     int64_t group_size, int64_t compute) {
  return lowbit_linear_by(x_any, packed, scales, zeros, bias, add, layout, n, k, group_size,
                          compute,
                          [&](const LowbitWeight& w, const Tensor& x, int64_t m, Tensor& y) {
                            const LowbitLinear linear(w, packed, scales, or_null(zeros),
                                                      or_null(bias), compute, m, float_type(x));
                            const Workspace workspace(linear.scratch_bytes());
                            linear.run(x.const_data_ptr(), const_data(or_null(add)),
                                       y.mutable_data_ptr(), workspace.scratch(), torch_parallel());
                          });
}

Tensor lowbit_embedding(const Tensor& ids_any, const Tensor& packed, const Tensor& scales,
                        const std::optional<Tensor>& zeros, int64_t layout, int64_t n, int64_t k,
                        int64_t group_size, ScalarType dtype) {
  constexpr const char* kOp = "lowbit_embedding";
  check_dtype(kOp, "ids", ids_any, ScalarType::Long);
  OW_CHECK(ids_any.dim() < kMaxDim, kOp, ": ids must have fewer than ", kMaxDim,
           " dimensions, got ", ids_any.dim());
  const LowbitWeight w = check_lowbit_geometry(kOp, check_layout(kOp, layout), n, k, group_size);
  check_lowbit_tensors(kOp, w, packed, scales, or_null(zeros));
  OW_CHECK(is_float(dtype), kOp, ": dtype must be float32, bfloat16 or float16, got ",
           dtype_name(dtype));
  const Tensor ids = as_contiguous(ids_any);
  LowbitRowsArgs args{};
  args.count = ids.numel();
  args.rows = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < args.count; ++i) {
    OW_CHECK(args.rows[i] >= 0 && args.rows[i] < n, kOp, ": ids must be in 0 .. ", n - 1, ", got ",
             args.rows[i]);
  }
  int64_t sizes[kMaxDim];
  for (int64_t i = 0; i < ids.dim(); ++i) sizes[i] = ids.size(i);
  sizes[ids.dim()] = k;
  Tensor y = fast_empty(sizes, ids.dim() + 1, dtype);
  args.k = k;
  args.k_padded = w.k_padded;
  args.group_size = group_size;
  args.groups = w.groups;
  args.bits = w.layout->bits;
  args.w = static_cast<const uint8_t*>(packed.const_data_ptr());
  args.w_scales = scales.const_data_ptr();
  args.w_scales_type = float_type(scales);
  args.w_zeros = static_cast<const uint8_t*>(const_data(or_null(zeros)));
  args.y = y.mutable_data_ptr();
  args.y_type = float_type(dtype);
  if (y.numel() > 0) lowbit_rows(args, torch_parallel());
  return y;
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x) {
  return quantize_rows_by(
      x, [](const EncodeArgs& args) { encode_rows(args, active_isa(), torch_parallel()); });
}

int64_t scale_size(const Tensor& scales) {
  return scales.scalar_type() == ScalarType::Float ? 4 : 2;
}

LowbitPackArgs pack_args(const LowbitWeight& w, const Tensor& scales) {
  return {w.n, w.k, w.k_padded, w.groups, w.layout->bits, scale_size(scales)};
}

std::tuple<Tensor, Tensor, Tensor> pack_lowbit_op(const Tensor& codes_any, const Tensor& scales_any,
                                                  const std::optional<Tensor>& zeros_any,
                                                  int64_t bits, int64_t group_size) {
  constexpr const char* kOp = "pack_lowbit";
  const LayoutInfo* layout = layout_for_bits(LayoutFamily::lowbit, bits);
  OW_CHECK(layout != nullptr, kOp, ": bits must be 2, 3, 4 or 8, got ", bits);
  check_dtype(kOp, "codes", codes_any, ScalarType::Byte);
  OW_CHECK(codes_any.dim() == 2, kOp, ": codes must be [n, k], got ", shape_text(codes_any));
  const LowbitWeight w =
      check_lowbit_geometry(kOp, layout, codes_any.size(0), codes_any.size(1), group_size);
  check_float(kOp, "scales", scales_any);
  check_shape(kOp, "scales", scales_any, {w.n, w.groups});
  std::optional<Tensor> zeros;
  if (zeros_any.has_value()) {
    check_dtype(kOp, "zeros", *zeros_any, ScalarType::Byte);
    check_shape(kOp, "zeros", *zeros_any, {w.n, w.groups});
    zeros = as_contiguous(*zeros_any);
  }
  const Tensor codes = as_contiguous(codes_any);
  const Tensor scales = as_contiguous(scales_any);
  check_codes(kOp, "codes", codes, bits);
  check_finite(kOp, scales);
  if (zeros.has_value()) check_codes(kOp, "zeros", *zeros, bits);
  Tensor packed = fast_empty(
      {w.panels, w.k_padded / block_k(layout->bits), 2, block_bytes(layout->bits) / 128, kHalf, 4},
      ScalarType::Byte);
  Tensor packed_scales = fast_empty({w.panels, w.groups, kPanel}, scales.scalar_type());
  Tensor packed_zeros =
      fast_empty({zeros.has_value() ? w.panels : 0, w.groups, kPanel}, ScalarType::Byte);
  pack_lowbit(pack_args(w, scales), static_cast<const uint8_t*>(codes.const_data_ptr()),
              scales.const_data_ptr(), static_cast<const uint8_t*>(const_data(or_null(zeros))),
              static_cast<uint8_t*>(packed.mutable_data_ptr()), packed_scales.mutable_data_ptr(),
              static_cast<uint8_t*>(packed_zeros.mutable_data_ptr()), torch_parallel());
  return {packed, packed_scales, packed_zeros};
}

std::tuple<Tensor, Tensor, Tensor> unpack_lowbit_op(const Tensor& packed, const Tensor& scales,
                                                    const std::optional<Tensor>& zeros,
                                                    int64_t layout, int64_t n, int64_t k,
                                                    int64_t group_size) {
  constexpr const char* kOp = "unpack_lowbit";
  const LowbitWeight w = check_lowbit_geometry(kOp, check_layout(kOp, layout), n, k, group_size);
  check_lowbit_tensors(kOp, w, packed, scales, or_null(zeros));
  Tensor codes = fast_empty({n, k}, ScalarType::Byte);
  Tensor flat_scales = fast_empty({n, w.groups}, scales.scalar_type());
  Tensor flat_zeros = fast_empty({zeros.has_value() ? n : 0, w.groups}, ScalarType::Byte);
  unpack_lowbit(pack_args(w, scales), static_cast<const uint8_t*>(packed.const_data_ptr()),
                scales.const_data_ptr(), static_cast<const uint8_t*>(const_data(or_null(zeros))),
                static_cast<uint8_t*>(codes.mutable_data_ptr()), flat_scales.mutable_data_ptr(),
                zeros.has_value() ? static_cast<uint8_t*>(flat_zeros.mutable_data_ptr()) : nullptr,
                torch_parallel());
  return {codes, flat_scales, flat_zeros};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(ow::kLowbitLinearSchema);
  m.def(
      "lowbit_embedding(Tensor ids, Tensor packed, Tensor scales, Tensor? zeros, int layout, int "
      "n, "
      "int k, int group_size, ScalarType dtype) -> Tensor");
  m.def(ow::kQuantizeRowsSchema);
  m.def(
      "pack_lowbit(Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size) -> "
      "(Tensor packed, Tensor scales, Tensor zeros)");
  m.def(
      "unpack_lowbit(Tensor packed, Tensor scales, Tensor? zeros, int layout, int n, int k, "
      "int group_size) -> (Tensor codes, Tensor scales, Tensor zeros)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("lowbit_linear", TORCH_BOX(&ow::lowbit_linear));
  m.impl("lowbit_embedding", TORCH_BOX(&ow::lowbit_embedding));
  m.impl("quantize_rows", TORCH_BOX(&ow::quantize_rows));
  m.impl("pack_lowbit", TORCH_BOX(&ow::pack_lowbit_op));
  m.impl("unpack_lowbit", TORCH_BOX(&ow::unpack_lowbit_op));
}
