#include "kernels/lowbit_gemm/lowbit_gemm.h"

#include <string>
#include <tuple>

#include "kernels/quantize/quantize.h"
#include "ops/glue.h"

namespace ow {
namespace {

struct Geometry {
  const LayoutInfo* layout;
  int64_t n, k, k_padded, panels, group_size, groups;
};

Geometry check_geometry(const char* op, const LayoutInfo* layout, int64_t n, int64_t k,
                        int64_t group_size) {
  OW_CHECK(n >= 1 && k >= 1, op, ": weight must have at least one row and one column, got n = ", n,
           ", k = ", k);
  OW_CHECK(group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128 ||
               group_size == k,
           op, ": group_size must be 16, 32, 64, 128 or k = ", k, ", got ", group_size);
  OW_CHECK(group_size <= kMaxGroup, op, ": one group a row takes k up to ", kMaxGroup, ", got ", k,
           "; use a smaller group_size");
  return {layout, n, k, round_up(k, kPadK), div_up(n, kPanel), group_size, div_up(k, group_size)};
}

void check_packed(const char* op, const Geometry& w, const Tensor& packed, const Tensor& scales,
                  const std::optional<Tensor>& zeros) {
  check_dtype(op, "packed", packed, ScalarType::Byte);
  const int64_t blocks = w.k_padded / block_k(w.layout->bits);
  const int64_t lines = block_bytes(w.layout->bits) / 128;
  check_shape(op, "packed", packed, {w.panels, blocks, 2, lines, kHalf, 4});
  check_contiguous(op, "packed", packed);
  check_float(op, "scales", scales);
  check_shape(op, "scales", scales, {w.panels, w.groups, kPanel});
  check_contiguous(op, "scales", scales);
  if (zeros.has_value()) {
    check_dtype(op, "zeros", *zeros, ScalarType::Byte);
    check_shape(op, "zeros", *zeros, {w.panels, w.groups, kPanel});
    check_contiguous(op, "zeros", *zeros);
  }
}

const LayoutInfo* check_layout(const char* op, int64_t layout) {
  const LayoutInfo* info = layout_info(layout);
  OW_CHECK(info != nullptr, op, ": layout must be one this build reads, got id ", layout,
           "; re-pack with openwork.pack_lowbit");
  return info;
}

constexpr int64_t kComputeFloat = 0;
constexpr int64_t kComputeInt8 = 1;

Tensor lowbit_linear(const Tensor& x_any, const Tensor& packed, const Tensor& scales,
                     const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& add, int64_t layout, int64_t n, int64_t k,
                     int64_t group_size, int64_t compute) {
  constexpr const char* kOp = "lowbit_linear";
  check_float(kOp, "x", x_any);
  OW_CHECK(x_any.dim() >= 1 && x_any.size(-1) == k, kOp, ": x must have last dimension k = ", k,
           " (from weight), got ", shape_text(x_any));
  const Geometry w = check_geometry(kOp, check_layout(kOp, layout), n, k, group_size);
  check_packed(kOp, w, packed, scales, zeros);
  OW_CHECK(compute == kComputeFloat || compute == kComputeInt8, kOp,
           ": compute must be 0 (float) or 1 (int8), got ", compute);
  const ScalarType dtype = x_any.scalar_type();
  if (bias.has_value()) {
    check_dtype(kOp, "bias", *bias, dtype);
    check_shape(kOp, "bias", *bias, {n});
    check_contiguous(kOp, "bias", *bias);
  }
  Tensor y = empty_with_last(x_any, n, dtype);
  if (add.has_value()) {
    check_dtype(kOp, "add", *add, dtype);
    OW_CHECK(shape_text(*add) == shape_text(y), kOp, ": add must have shape ", shape_text(y),
             ", got ", shape_text(*add));
    check_contiguous(kOp, "add", *add);
  }
  const int64_t m = y.numel() / n;
  if (m == 0) return y;

  const Tensor x = as_contiguous(x_any);
  const Isa isa = active_isa();
  const Parallel parallel = torch_parallel();
  const bool as_bf16 =
      compute == kComputeFloat && dtype == ScalarType::BFloat16 && lowbit_gemm_takes_bf16(isa, m);
  const int32_t digits = as_bf16 ? 0 : compute == kComputeInt8 ? 1 : 3;

  LowbitGemmArgs args{};
  args.m = m;
  args.n = n;
  args.k = k;
  args.k_padded = w.k_padded;
  args.group_size = group_size;
  args.groups = w.groups;
  args.bits = w.layout->bits;
  args.digits = digits;
  args.w = static_cast<const uint8_t*>(packed.const_data_ptr());
  args.w_scales = scales.const_data_ptr();
  args.w_scales_type = float_type(scales);
  args.w_zeros = static_cast<const uint8_t*>(const_data(zeros));
  args.bias = const_data(bias);
  args.add = const_data(add);
  args.y = y.mutable_data_ptr();
  args.y_type = float_type(x);

  if (as_bf16) {
    Workspace workspace(Workspace::bytes_for(m * w.k_padded * 2));
    bf16* rows = workspace.take<bf16>(m * w.k_padded);
    const bf16* from = static_cast<const bf16*>(x.const_data_ptr());
    parallel.for_each(m, [&](int64_t i) {
      memcpy(rows + i * w.k_padded, from + i * k, size_t(k) * 2);
      memset(rows + i * w.k_padded + k, 0, size_t(w.k_padded - k) * 2);
    });
    args.x = rows;
    lowbit_gemm(args, isa, parallel);
    return y;
  }

  const int64_t rows = m * digits;
  const int64_t row_block = lowbit_gemm_row_block(isa, rows);
  const int64_t code_bytes = round_up(rows, row_block) * w.k_padded;
  const int64_t scale_count = digits == 1 ? m : m * w.groups;
  Workspace workspace(Workspace::bytes_for(code_bytes) + Workspace::bytes_for(scale_count * 4) +
                      Workspace::bytes_for(rows * w.groups * 4));
  EncodeArgs encode{};
  encode.m = m;
  encode.k = k;
  encode.k_padded = w.k_padded;
  encode.group_size = group_size;
  encode.digits = digits;
  encode.row_block = row_block;
  encode.sum_factor = lowbit_sum_factor(w.layout->bits, !zeros.has_value());
  encode.x_type = float_type(x);
  encode.x = x.const_data_ptr();
  encode.stride_x = k;
  encode.codes = workspace.take<int8_t>(code_bytes);
  encode.scales = workspace.take<float>(scale_count);
  encode.sums = workspace.take<int32_t>(rows * w.groups);
  encode_rows(encode, isa, parallel);
  args.row_block = row_block;
  args.x = encode.codes;
  args.x_scales = encode.scales;
  args.x_sums = encode.sums;
  lowbit_gemm(args, isa, parallel);
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
  Tensor codes = empty_with_last(x, k, ScalarType::Char);
  int64_t sizes[16];
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes[i] = x.size(i);
  Tensor scales = fast_empty(sizes, x.dim() - 1, ScalarType::Float);
  if (m == 0) return {codes, scales};
  EncodeArgs encode{};
  encode.m = m;
  encode.k = encode.k_padded = encode.group_size = encode.stride_x = k;
  encode.digits = 1;
  encode.row_block = 1;
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

LowbitPackArgs pack_args(const Geometry& w, const Tensor& scales) {
  return {w.n, w.k, w.k_padded, w.groups, w.layout->bits, scale_size(scales)};
}

void check_codes(const char* op, const char* name, const Tensor& tensor, int64_t bits) {
  const uint8_t* values = static_cast<const uint8_t*>(tensor.const_data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    OW_CHECK(values[i] >> bits == 0, op, ": ", name, " must be in 0 .. ", (1 << bits) - 1, " for ",
             bits, " bits, got ", int(values[i]));
  }
}

void check_finite(const char* op, const Tensor& scales) {
  const void* p = scales.const_data_ptr();
  for (int64_t i = 0; i < scales.numel(); ++i) {
    float value;
    switch (float_type(scales)) {
      case FloatType::f32: value = static_cast<const float*>(p)[i]; break;
      case FloatType::bf16: value = to_float(static_cast<const bf16*>(p)[i]); break;
      default: value = to_float(static_cast<const f16*>(p)[i]); break;
    }
    OW_CHECK((float_to_bits(value) & 0x7fffffff) < 0x7f800000, op, ": scales must be finite, got ",
             value, " at element ", i);
  }
}

std::tuple<Tensor, Tensor, Tensor> pack_lowbit_op(const Tensor& codes_any, const Tensor& scales_any,
                                                  const std::optional<Tensor>& zeros_any,
                                                  int64_t bits, int64_t group_size) {
  constexpr const char* kOp = "pack_lowbit";
  const LayoutInfo* layout = layout_for_bits(bits);
  OW_CHECK(layout != nullptr, kOp, ": bits must be 2, 3, 4 or 8, got ", bits);
  check_dtype(kOp, "codes", codes_any, ScalarType::Byte);
  OW_CHECK(codes_any.dim() == 2, kOp, ": codes must be [n, k], got ", shape_text(codes_any));
  const Geometry w = check_geometry(kOp, layout, codes_any.size(0), codes_any.size(1), group_size);
  check_float(kOp, "scales", scales_any);
  check_shape(kOp, "scales", scales_any, {w.n, w.groups});
  const Tensor codes = as_contiguous(codes_any);
  const Tensor scales = as_contiguous(scales_any);
  check_codes(kOp, "codes", codes, bits);
  check_finite(kOp, scales);
  std::optional<Tensor> zeros;
  if (zeros_any.has_value()) {
    check_dtype(kOp, "zeros", *zeros_any, ScalarType::Byte);
    check_shape(kOp, "zeros", *zeros_any, {w.n, w.groups});
    zeros = as_contiguous(*zeros_any);
    check_codes(kOp, "zeros", *zeros, bits);
  }
  Tensor packed = fast_empty(
      {w.panels, w.k_padded / block_k(layout->bits), 2, block_bytes(layout->bits) / 128, kHalf, 4},
      ScalarType::Byte);
  Tensor packed_scales = fast_empty({w.panels, w.groups, kPanel}, scales.scalar_type());
  Tensor packed_zeros =
      fast_empty({zeros.has_value() ? w.panels : 0, w.groups, kPanel}, ScalarType::Byte);
  pack_lowbit(pack_args(w, scales), static_cast<const uint8_t*>(codes.const_data_ptr()),
              scales.const_data_ptr(), static_cast<const uint8_t*>(const_data(zeros)),
              static_cast<uint8_t*>(packed.mutable_data_ptr()), packed_scales.mutable_data_ptr(),
              static_cast<uint8_t*>(packed_zeros.mutable_data_ptr()), torch_parallel());
  return {packed, packed_scales, packed_zeros};
}

std::tuple<Tensor, Tensor, Tensor> unpack_lowbit_op(const Tensor& packed, const Tensor& scales,
                                                    const std::optional<Tensor>& zeros,
                                                    int64_t layout, int64_t n, int64_t k,
                                                    int64_t group_size) {
  constexpr const char* kOp = "unpack_lowbit";
  const Geometry w = check_geometry(kOp, check_layout(kOp, layout), n, k, group_size);
  check_packed(kOp, w, packed, scales, zeros);
  Tensor codes = fast_empty({n, k}, ScalarType::Byte);
  Tensor flat_scales = fast_empty({n, w.groups}, scales.scalar_type());
  Tensor flat_zeros = fast_empty({zeros.has_value() ? n : 0, w.groups}, ScalarType::Byte);
  unpack_lowbit(pack_args(w, scales), static_cast<const uint8_t*>(packed.const_data_ptr()),
                scales.const_data_ptr(), static_cast<const uint8_t*>(const_data(zeros)),
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
  m.impl("quantize_rows", TORCH_BOX(&ow::quantize_rows));
  m.impl("pack_lowbit", TORCH_BOX(&ow::pack_lowbit_op));
  m.impl("unpack_lowbit", TORCH_BOX(&ow::unpack_lowbit_op));
}
