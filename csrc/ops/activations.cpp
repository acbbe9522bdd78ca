#include "kernels/activations/activations.h"

#include "ops/glue.h"

namespace ow {
namespace {

Tensor rms_norm_op(const Tensor& x_any, const Tensor& weight, double eps) {
  constexpr const char* kOp = "rms_norm";
  check_float(kOp, "x", x_any);
  OW_CHECK(x_any.dim() >= 1 && x_any.size(-1) >= 1, kOp,
           ": x must have a last dimension of at least 1, got ", shape_text(x_any));
  const int64_t d = x_any.size(-1);
  check_dtype(kOp, "weight", weight, x_any.scalar_type());
  check_shape(kOp, "weight", weight, {d});
  check_contiguous(kOp, "weight", weight);
  const Tensor x = as_contiguous(x_any);
  Tensor y = empty_with_last(x, d, x.scalar_type());
  rms_norm({x.numel() / d, d, float_type(x), x.const_data_ptr(), weight.const_data_ptr(),
            float(eps), y.mutable_data_ptr()},
           active_isa(), torch_parallel());
  return y;
}

Tensor silu_mul_op(const Tensor& x_any) {
  constexpr const char* kOp = "silu_mul";
  check_float(kOp, "x", x_any);
  OW_CHECK(x_any.dim() >= 1 && x_any.size(-1) >= 2 && x_any.size(-1) % 2 == 0, kOp,
           ": x must have an even last dimension (gate and up), got ", shape_text(x_any));
  const int64_t d = x_any.size(-1) / 2;
  const Tensor x = as_contiguous(x_any);
  Tensor y = empty_with_last(x, d, x.scalar_type());
  silu_mul({x.numel() / (2 * d), d, float_type(x), x.const_data_ptr(), y.mutable_data_ptr()},
           active_isa(), torch_parallel());
  return y;
}

Tensor rope_op(const Tensor& x_any, const Tensor& cos, const Tensor& sin) {
  constexpr const char* kOp = "rope";
  check_float(kOp, "x", x_any);
  OW_CHECK(x_any.dim() == 4 && x_any.size(3) >= 2 && x_any.size(3) % 2 == 0, kOp,
           ": x must be [b, t, h, d] with d even, got ", shape_text(x_any));
  const int64_t t = x_any.size(1);
  const int64_t d = x_any.size(3);
  for (const auto& [name, table] : {std::pair("cos", &cos), std::pair("sin", &sin)}) {
    check_dtype(kOp, name, *table, ScalarType::Float);
    check_shape(kOp, name, *table, {t, d / 2});
    check_contiguous(kOp, name, *table);
  }
  const Tensor x = x_any.stride(3) == 1 ? x_any : torch::stable::contiguous(x_any);
  Tensor y = fast_empty({x.size(0), t, x.size(2), d}, x.scalar_type());
  rope({x.size(0), t, x.size(2), d, float_type(x), x.const_data_ptr(), x.stride(0), x.stride(1),
        x.stride(2), static_cast<const float*>(cos.const_data_ptr()),
        static_cast<const float*>(sin.const_data_ptr()), y.mutable_data_ptr()},
       active_isa(), torch_parallel());
  return y;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor x) -> Tensor");
  m.def("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&ow::rms_norm_op));
  m.impl("silu_mul", TORCH_BOX(&ow::silu_mul_op));
  m.impl("rope", TORCH_BOX(&ow::rope_op));
}
