#include "ops/lowbit_linear.h"

#include <tuple>

#include "kernels/quantize/quantize.h"
#include "ops/linear.h"
#include "ops/values.h"

namespace ow {

const LayoutInfo* check_layout(const char* op, int64_t layout) {
  const LayoutInfo* info = layout_info(layout);
  OW_CHECK(info != nullptr && info->family == LayoutFamily::lowbit, op,
           ": layout must be one this build reads, got id ", layout,
           "; re-pack with openwork.pack_lowbit");
  OW_CHECK(info->bits != 0, op, ": layout must be that of a low-bit weight, got ", info->text);
  return info;
}

LowbitWeight check_lowbit_geometry(const char* op, const LayoutInfo* layout, int64_t n, int64_t k,
                                   int64_t group_size) {
  check_weight_size(op, n, k);
  OW_CHECK(group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128 ||
               group_size == k,
           op, ": group_size must be 16, 32, 64, 128 or k = ", k, ", got ", group_size);
  OW_CHECK(group_size <= kMaxGroup, op, ": one group a row takes k up to ", kMaxGroup, ", got ", k,
           "; use a smaller group_size");
  return {layout, n, k, round_up(k, kPadK), div_up(n, kPanel), group_size, div_up(k, group_size)};
}

void check_lowbit_tensors(const char* op, const LowbitWeight& w, const Tensor& packed,
                          const Tensor& scales, const Tensor* zeros) {
  check_dtype(op, "packed", packed, ScalarType::Byte);
  const int64_t blocks = w.k_padded / block_k(w.layout->bits);
  const int64_t lines = block_bytes(w.layout->bits) / 128;
  check_shape(op, "packed", packed, {w.panels, blocks, 2, lines, kHalf, 4});
  check_contiguous(op, "packed", packed);
  check_float(op, "scales", scales);
  check_shape(op, "scales", scales, {w.panels, w.groups, kPanel});
  check_contiguous(op, "scales", scales);
  if (zeros != nullptr) {
    check_operand(op, "zeros", *zeros, ScalarType::Byte, {w.panels, w.groups, kPanel});
  }
}

void check_compute(const char* op, int64_t compute) {
  OW_CHECK(compute == kComputeFloat || compute == kComputeInt8, op,
           ": compute must be 0 (float) or 1 (int8), got ", compute);
}

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
  constexpr const char* kOp = "lowbit_linear";
  check_linear_x(kOp, x_any, k);
  const LowbitWeight w = check_lowbit_geometry(kOp, check_layout(kOp, layout), n, k, group_size);
  check_lowbit_tensors(kOp, w, packed, scales, or_null(zeros));
  check_compute(kOp, compute);
  Tensor y = linear_result(kOp, x_any, n, or_null(bias), or_null(add));
  const int64_t m = y.numel() / n;
  if (m == 0) return y;
  const Tensor x = as_contiguous(x_any);
  const LowbitLinear linear(w, packed, scales, or_null(zeros), or_null(bias), compute, m,
                            float_type(x));
  const Workspace workspace(linear.scratch_bytes());
  linear.run(x.const_data_ptr(), const_data(or_null(add)), y.mutable_data_ptr(),
             workspace.scratch(), torch_parallel());
  return y;
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

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x_any) {
  constexpr const char* kOp = "quantize_rows";
  check_float(kOp, "x", x_any);
  OW_CHECK(x_any.dim() >= 1 && x_any.size(-1) >= 1, kOp,
           ": x must have a last dimension of at least 1, got ", shape_text(x_any));
  const int64_t k = x_any.size(-1);
  const int64_t m = x_any.numel() / k;
  const Tensor x = as_contiguous(x_any);
  Tensor codes = empty_with_last(kOp, x, k, ScalarType::Char);
  int64_t sizes[kMaxDim];
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes[i] = x.size(i);
  Tensor scales = fast_empty(sizes, x.dim() - 1, ScalarType::Float);
  if (m == 0) return {codes, scales};
  EncodeArgs encode{};
  encode.m = m;
  encode.k = encode.group_size = encode.stride_x = k;
  encode.digits = 1;
  encode.blocks = {1, kUnit, k};
  encode.x_type = float_type(x);
  encode.x = x.const_data_ptr();
  encode.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  encode.scales = static_cast<float*>(scales.mutable_data_ptr());
  encode_rows(encode, active_isa(), torch_parallel());
  return {codes, scales};
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
  m.def(
      "lowbit_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, "
      "Tensor? add, int layout, int n, int k, int group_size, int compute) -> Tensor");
  m.def(
      "lowbit_embedding(Tensor ids, Tensor packed, Tensor scales, Tensor? zeros, int layout, int "
      "n, "
      "int k, int group_size, ScalarType dtype) -> Tensor");
  m.def("quantize_rows(Tensor x) -> (Tensor codes, Tensor scales)");
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
