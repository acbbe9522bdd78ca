#include "kernels/active_gemv/active_gemv.h"

#include "ops/linear.h"
#include "ops/values.h"

namespace ow {
namespace {

struct Columns {
  int64_t n, k, n_padded, group_size, groups;
  int32_t bits;  // 0: floats
};

// Bits of the codes of a layout of columns; 0 for floats.
int32_t column_bits(const char* op, int64_t layout) {
  const LayoutInfo* info = layout_info(layout);
  OW_CHECK(info != nullptr, op, ": layout must be one of columns, got id ", layout);
  OW_CHECK(info->family == LayoutFamily::columns, op, ": layout must be one of columns, got ",
           info->text);
  return info->bits;
}

Columns check_columns_size(const char* op, int32_t bits, int64_t n, int64_t k, int64_t group_size) {
  check_weight_size(op, n, k);
  OW_CHECK(group_size == k || (bits != 0 && (group_size == 16 || group_size == 32 ||
                                             group_size == 64 || group_size == 128)),
           op, ": group_size must be ", bits == 0 ? "k = " : "16, 32, 64, 128 or k = ", k, ", got ",
           group_size);
  return {n, k, round_up(n, strip_outputs(bits)), group_size, div_up(k, group_size), bits};
}

void check_columns(const char* op, const Columns& w, const Tensor& columns, const Tensor* scales,
                   const Tensor* zeros) {
  if (w.bits == 0) {
    check_defined(op, "columns", columns);
    OW_CHECK(
        columns.scalar_type() == ScalarType::Float || columns.scalar_type() == ScalarType::BFloat16,
        op, ": columns must be float32 or bfloat16, got ", dtype_name(columns.scalar_type()));
    check_shape(op, "columns", columns, {w.k, w.n_padded});
    check_contiguous(op, "columns", columns);
    OW_CHECK(scales == nullptr && zeros == nullptr, op,
             ": scales and zeros must be None for columns of floats, got a tensor");
    return;
  }
  check_operand(op, "columns", columns, ScalarType::Byte,
                {w.k, w.n_padded / strip_outputs(w.bits), 64});
  OW_CHECK(scales != nullptr, op, ": scales must be a tensor for columns of codes, got None");
  check_operand(op, "scales", *scales, ScalarType::Float, {w.groups, w.n_padded});
  if (zeros != nullptr) {
    check_operand(op, "zeros", *zeros, ScalarType::Byte, {w.groups, w.n_padded});
  }
}

ColumnType column_type(const Columns& w, const Tensor& columns) {
  if (w.bits != 0) return ColumnType::codes;
  return columns.scalar_type() == ScalarType::Float ? ColumnType::f32 : ColumnType::bf16;
}

// Where element `at` of a tensor of `type` is; null stays null.
const void* element(const void* data, FloatType type, int64_t at) {
  return data == nullptr ? nullptr : static_cast<const uint8_t*>(data) + at * float_size(type);
}

Tensor active_linear(const Tensor& x_any, const Tensor& columns,
                     const std::optional<Tensor>& scales, const std::optional<Tensor>& zeros,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
                     double threshold, int64_t layout, int64_t n, int64_t k, int64_t group_size) {
  constexpr const char* kOp = "active_linear";
  check_linear_x(kOp, x_any, k);
  const Columns w = check_columns_size(kOp, column_bits(kOp, layout), n, k, group_size);
  check_columns(kOp, w, columns, or_null(scales), or_null(zeros));
  OW_CHECK(threshold >= 0.0, kOp, ": threshold must be at least 0, got ", threshold);
  Tensor y = linear_result(kOp, x_any, n, or_null(bias), or_null(add));
  const int64_t m = y.numel() / n;
  if (m == 0) return y;
  const Tensor x = as_contiguous(x_any);
  const FloatType type = float_type(x);
  const Workspace workspace(2 * Scratch::bytes_for(k * 4) + Scratch::bytes_for(w.groups * 8));
  Scratch scratch = workspace.scratch();
  int32_t* index = scratch.take<int32_t>(k);
  float* active_x = scratch.take<float>(k);
  int64_t* group_end = scratch.take<int64_t>(w.groups);
  ActiveGemvArgs args{};
  args.n = n;
  args.n_padded = w.n_padded;
  args.groups = w.groups;
  args.type = column_type(w, columns);
  args.bits = w.bits;
  args.columns = columns.const_data_ptr();
  args.scales = static_cast<const float*>(const_data(or_null(scales)));
  args.zeros = static_cast<const uint8_t*>(const_data(or_null(zeros)));
  args.bias = const_data(or_null(bias));
  args.y_type = type;
  const void* add_data = const_data(or_null(add));
  uint8_t* y_data = static_cast<uint8_t*>(y.mutable_data_ptr());
  for (int64_t i = 0; i < m; ++i) {
    const void* row = element(x.const_data_ptr(), type, i * k);
    const int64_t count =
        find_active(row, type, k, group_size, float(threshold), index, active_x, group_end);
    args.active = {count, index, active_x, group_end};
    args.add = element(add_data, type, i * n);
    args.y = y_data + i * n * float_size(type);
    active_gemv(args, active_isa(), torch_parallel());
  }
  return y;
}

int32_t check_code_bits(const char* op, int64_t bits) {
  OW_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, op,
           ": bits must be 2, 3, 4 or 8, got ", bits);
  return int32_t(bits);
}

Tensor pack_code_columns_op(const Tensor& codes_any, int64_t bits) {
  constexpr const char* kOp = "pack_code_columns";
  const int32_t code_bits = check_code_bits(kOp, bits);
  check_dtype(kOp, "codes", codes_any, ScalarType::Byte);
  OW_CHECK(codes_any.dim() == 2, kOp, ": codes must be [n, k], got ", shape_text(codes_any));
  const int64_t n = codes_any.size(0);
  const int64_t k = codes_any.size(1);
  check_weight_size(kOp, n, k);
  const Tensor codes = as_contiguous(codes_any);
  check_codes(kOp, "codes", codes, bits);
  const int64_t strip = strip_outputs(code_bits);
  Tensor columns = fast_empty({k, div_up(n, strip), 64}, ScalarType::Byte);
  pack_code_columns({n, k, round_up(n, strip), code_bits},
                    static_cast<const uint8_t*>(codes.const_data_ptr()),
                    static_cast<uint8_t*>(columns.mutable_data_ptr()), torch_parallel());
  return columns;
}

Tensor unpack_code_columns_op(const Tensor& columns, int64_t bits, int64_t n) {
  constexpr const char* kOp = "unpack_code_columns";
  const int32_t code_bits = check_code_bits(kOp, bits);
  check_dtype(kOp, "columns", columns, ScalarType::Byte);
  OW_CHECK(columns.dim() == 3, kOp, ": columns must be [k, strips, 64], got ", shape_text(columns));
  const int64_t k = columns.size(0);
  check_weight_size(kOp, n, k);
  const int64_t strip = strip_outputs(code_bits);
  check_shape(kOp, "columns", columns, {k, div_up(n, strip), 64});
  check_contiguous(kOp, "columns", columns);
  Tensor codes = fast_empty({n, k}, ScalarType::Byte);
  unpack_code_columns({n, k, round_up(n, strip), code_bits},
                      static_cast<const uint8_t*>(columns.const_data_ptr()),
                      static_cast<uint8_t*>(codes.mutable_data_ptr()), torch_parallel());
  return codes;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "active_linear(Tensor x, Tensor columns, Tensor? scales, Tensor? zeros, Tensor? bias, "
      "Tensor? add, float threshold, int layout, int n, int k, int group_size) -> Tensor");
  m.def("pack_code_columns(Tensor codes, int bits) -> Tensor");
  m.def("unpack_code_columns(Tensor columns, int bits, int n) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("active_linear", TORCH_BOX(&ow::active_linear));
  m.impl("pack_code_columns", TORCH_BOX(&ow::pack_code_columns_op));
  m.impl("unpack_code_columns", TORCH_BOX(&ow::unpack_code_columns_op));
}
