// What linears share: the checks of their layout, shape, values, x, bias and add.
#pragma once

#include "core/layout.h"
#include "ops/glue.h"

namespace ow {

inline void check_layout_is(const char* op, int64_t layout, Layout want) {
  const LayoutInfo* info = layout_info(layout);
  const char* expected = layout_info(int64_t(want))->text;
  OW_CHECK(info != nullptr, op, ": layout must be ", expected, ", got id ", layout);
  OW_CHECK(info->id == want, op, ": layout must be ", expected, ", got ", info->text);
}

inline void check_weight_size(const char* op, int64_t n, int64_t k) {
  OW_CHECK(n >= 1 && k >= 1, op, ": weight must have at least one row and one column, got n = ", n,
           ", k = ", k);
  constexpr int64_t kMaxSide = int64_t{1} << 31;
  OW_CHECK(n < kMaxSide && k < kMaxSide, op,
           ": weight must have fewer than 2^31 rows and columns, got n = ", n, ", k = ", k);
}

// The dtype of stored values, and of a weight to store.
inline ValueType check_value_dtype(const char* op, const char* name, const Tensor& tensor) {
  check_defined(op, name, tensor);
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return ValueType::f32;
    case ScalarType::BFloat16: return ValueType::bf16;
    case ScalarType::Char: return ValueType::i8;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or int8, got ",
           dtype_name(tensor.scalar_type()));
  }
}

inline void check_linear_x(const char* op, const Tensor& x, int64_t k) {
  check_float(op, "x", x);
  OW_CHECK(x.dim() >= 1 && x.size(-1) == k, op, ": x must have last dimension k = ", k,
           " (from weight), got ", shape_text(x));
}

// The result [..., n] of x [..., k], once bias and add (either may be null) fit it.
inline Tensor linear_result(const char* op, const Tensor& x, int64_t n, const Tensor* bias,
                            const Tensor* add) {
  const ScalarType dtype = x.scalar_type();
  if (bias != nullptr) check_operand(op, "bias", *bias, dtype, {n});
  Tensor y = empty_with_last(op, x, n, dtype);
  if (add != nullptr) {
    check_dtype(op, "add", *add, dtype);
    OW_CHECK(same_shape(*add, y), op, ": add must have shape ", shape_text(y), ", got ",
             shape_text(*add));
    check_contiguous(op, "add", *add);
  }
  return y;
}

}  // namespace ow
