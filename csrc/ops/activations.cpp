#include "ops/rope_append.h"

#include "ops/cache.h"

namespace ow {
namespace {

Tensor rms_norm_op(const Tensor& x_any, const Tensor& weight, double eps) {
  constexpr const char* kOp = "rms_norm";
  check_float(kOp, "x", x_any);
  OW_CHECK(x_any.dim() >= 1 && x_any.size(-1) >= 1, kOp,
           ": x must have a last dimension of at least 1, got ", shape_text(x_any));
  const int64_t d = x_any.size(-1);
  check_operand(kOp, "weight", weight, x_any.scalar_type(), {d});
  const Tensor x = as_contiguous(x_any);
  Tensor y = empty_with_last(kOp, x, d, x.scalar_type());
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
  Tensor y = empty_with_last(kOp, x, d, x.scalar_type());
  silu_mul({x.numel() / (2 * d), d, float_type(x), x.const_data_ptr(), y.mutable_data_ptr()},
           active_isa(), torch_parallel());
  return y;
}

void check_heads(const char* op, const char* name, const Tensor& x) {
  check_float(op, name, x);
  OW_CHECK(x.dim() == 4 && x.size(3) >= 2 && x.size(3) % 2 == 0, op, ": ", name,
           " must be [b, t, h, d] with d even, got ", shape_text(x));
}

HeadStrides head_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

}  // namespace

void check_tables(const char* op, const Tensor& cos, const Tensor& sin, int64_t t, int64_t d) {
  for (const auto& [name, table] : {std::pair("cos", &cos), std::pair("sin", &sin)}) {
    check_operand(op, name, *table, ScalarType::Float, {t, d / 2});
  }
}

RopeAppend::RopeAppend(int64_t b, int64_t t, int64_t h, int64_t d, FloatType type,
                       const Tensor& cos, const Tensor& sin, const Tensor& keys,
                       const Tensor& values, int64_t position)
    : args_{}, kv_heads_(keys.size(1)) {
  args_.b = b;
  args_.t = t;
  args_.h = args_.turned = h;
  args_.d = d;
  args_.type = type;
  args_.cos = static_cast<const float*>(cos.const_data_ptr());
  args_.sin = static_cast<const float*>(sin.const_data_ptr());
  args_.y_strides = {t * h * d, h * d, d};
  const int64_t size = float_size(type);
  const auto place = [&](const Tensor& cache) {
    return static_cast<char*>(cache.mutable_data_ptr()) + position * cache.stride(2) * size;
  };
  keys_ = place(keys);
  key_strides_ = {keys.stride(0), keys.stride(2), keys.stride(1)};
  values_ = place(values);
  value_strides_ = {values.stride(0), values.stride(2), values.stride(1)};
}

void RopeAppend::run(const void* x, HeadStrides x_strides, void* q,
                     const Parallel& parallel) const {
  const Isa isa = active_isa();
  RopeArgs args = args_;
  args.x = x;
  args.x_strides = x_strides;
  args.y = q;
  rope(args, isa, parallel);
  const int64_t head_bytes = x_strides.h * float_size(args.type);
  args.x = static_cast<const char*>(x) + args.h * head_bytes;
  args.h = args.turned = kv_heads_;
  args.y = keys_;
  args.y_strides = key_strides_;
  rope(args, isa, parallel);
  args.x = static_cast<const char*>(args.x) + kv_heads_ * head_bytes;
  args.turned = 0;
  args.y = values_;
  args.y_strides = value_strides_;
  rope(args, isa, parallel);
}

namespace {

Tensor rope_op(const Tensor& x_any, const Tensor& cos, const Tensor& sin) {
  constexpr const char* kOp = "rope";
  check_heads(kOp, "x", x_any);
  const Tensor x = x_any.stride(3) == 1 ? x_any : torch::stable::contiguous(x_any);
  RopeArgs args{};
  args.b = x.size(0);
  args.t = x.size(1);
  args.h = args.turned = x.size(2);
  args.d = x.size(3);
  check_tables(kOp, cos, sin, args.t, args.d);
  Tensor y = fast_empty({args.b, args.t, args.h, args.d}, x.scalar_type());
  args.type = float_type(x);
  args.x = x.const_data_ptr();
  args.x_strides = head_strides(x);
  args.cos = static_cast<const float*>(cos.const_data_ptr());
  args.sin = static_cast<const float*>(sin.const_data_ptr());
  args.y = y.mutable_data_ptr();
  args.y_strides = head_strides(y);
  rope(args, active_isa(), torch_parallel());
  return y;
}

Tensor rope_append_op(const Tensor& x_any, const Tensor& cos, const Tensor& sin, Tensor keys,
                      Tensor values, int64_t position) {
  constexpr const char* kOp = "rope_append";
  check_heads(kOp, "x", x_any);
  const int64_t b = x_any.size(0);
  const int64_t t = x_any.size(1);
  const int64_t d = x_any.size(3);
  check_tables(kOp, cos, sin, t, d);
  const int64_t g = check_cache(kOp, keys, values, b, d, d, x_any.scalar_type());
  check_position(kOp, keys, t, position);
  const int64_t h = x_any.size(2) - 2 * g;
  OW_CHECK(h >= 1, kOp, ": x must have more than 2 * kv_heads = ", 2 * g, " heads, got ",
           x_any.size(2));
  const Tensor x = x_any.stride(3) == 1 ? x_any : torch::stable::contiguous(x_any);
  Tensor q = fast_empty({b, t, h, d}, x.scalar_type());
  const RopeAppend step(b, t, h, d, float_type(x), cos, sin, keys, values, position);
  step.run(x.const_data_ptr(), head_strides(x), q.mutable_data_ptr(), torch_parallel());
  return q;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor x) -> Tensor");
  m.def("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def(
      "rope_append(Tensor x, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
      "int position) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&ow::rms_norm_op));
  m.impl("silu_mul", TORCH_BOX(&ow::silu_mul_op));
  m.impl("rope", TORCH_BOX(&ow::rope_op));
  m.impl("rope_append", TORCH_BOX(&ow::rope_append_op));
}
