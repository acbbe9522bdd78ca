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

void check_tables(const char* op, const Tensor& cos, const Tensor& sin, int64_t t, int64_t d) {
  for (const auto& [name, table] : {std::pair("cos", &cos), std::pair("sin", &sin)}) {
    check_dtype(op, name, *table, ScalarType::Float);
    check_shape(op, name, *table, {t, d / 2});
    check_contiguous(op, name, *table);
  }
}

void check_heads(const char* op, const char* name, const Tensor& x) {
  check_float(op, name, x);
  OW_CHECK(x.dim() == 4 && x.size(3) >= 2 && x.size(3) % 2 == 0, op, ": ", name,
           " must be [b, t, h, d] with d even, got ", shape_text(x));
}

RopeArgs rope_args(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  RopeArgs args{};
  args.b = x.size(0);
  args.t = x.size(1);
  args.h = args.turned = x.size(2);
  args.d = x.size(3);
  args.type = float_type(x);
  args.x = x.const_data_ptr();
  args.x_strides = {x.stride(0), x.stride(1), x.stride(2)};
  args.cos = static_cast<const float*>(cos.const_data_ptr());
  args.sin = static_cast<const float*>(sin.const_data_ptr());
  return args;
}

// Sends heads [begin, begin + count) of `args` to `y`.
RopeArgs heads_to(RopeArgs args, int64_t begin, int64_t count, void* y, HeadStrides strides) {
  const int64_t size = float_size(args.type);
  args.x = static_cast<const char*>(args.x) + begin * args.x_strides.h * size;
  args.h = count;
  args.turned = count;
  args.y = y;
  args.y_strides = strides;
  return args;
}

Tensor rope_op(const Tensor& x_any, const Tensor& cos, const Tensor& sin) {
  constexpr const char* kOp = "rope";
  check_heads(kOp, "x", x_any);
  check_tables(kOp, cos, sin, x_any.size(1), x_any.size(3));
  const Tensor x = x_any.stride(3) == 1 ? x_any : torch::stable::contiguous(x_any);
  const int64_t h = x.size(2);
  const int64_t d = x.size(3);
  Tensor y = fast_empty({x.size(0), x.size(1), h, d}, x.scalar_type());
  rope(heads_to(rope_args(x, cos, sin), 0, h, y.mutable_data_ptr(), {x.size(1) * h * d, h * d, d}),
       active_isa(), torch_parallel());
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
  OW_CHECK(keys.dim() == 4, kOp, ": keys must be [b, kv_heads, max_len, d], got ",
           shape_text(keys));
  const int64_t g = keys.size(1);
  const int64_t h = x_any.size(2) - 2 * g;
  OW_CHECK(h >= 1, kOp, ": x must have more than 2 * kv_heads = ", 2 * g, " heads, got ",
           x_any.size(2));
  const int64_t max_len = keys.size(2);
  for (const auto& [name, cache] : {std::pair("keys", &keys), std::pair("values", &values)}) {
    check_dtype(kOp, name, *cache, x_any.scalar_type());
    check_shape(kOp, name, *cache, {b, g, max_len, d});
    OW_CHECK(cache->stride(3) == 1, kOp, ": ", name, " must have a last stride of 1, got ",
             cache->stride(3));
  }
  OW_CHECK(position >= 0 && position <= max_len - t, kOp, ": position must be in 0 .. ",
           max_len - t, " (max_len less the tokens of x), got ", position);
  const Tensor x = x_any.stride(3) == 1 ? x_any : torch::stable::contiguous(x_any);
  Tensor q = fast_empty({b, t, h, d}, x.scalar_type());
  const RopeArgs args = rope_args(x, cos, sin);
  const int64_t size = float_size(args.type);
  const auto in_cache = [&](const Tensor& cache) {
    return static_cast<char*>(cache.mutable_data_ptr()) + position * cache.stride(2) * size;
  };
  const auto cache_strides = [](const Tensor& cache) {
    return HeadStrides{cache.stride(0), cache.stride(2), cache.stride(1)};
  };
  const Isa isa = active_isa();
  const Parallel parallel = torch_parallel();
  rope(heads_to(args, 0, h, q.mutable_data_ptr(), {t * h * d, h * d, d}), isa, parallel);
  rope(heads_to(args, h, g, in_cache(keys), cache_strides(keys)), isa, parallel);
  RopeArgs copy = heads_to(args, h + g, g, in_cache(values), cache_strides(values));
  copy.turned = 0;
  rope(copy, isa, parallel);
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
