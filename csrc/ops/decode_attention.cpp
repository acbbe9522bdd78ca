#include "kernels/decode_attention/decode_attention.h"

#include "ops/glue.h"

namespace ow {
namespace {

Tensor decode_attention_op(const Tensor& q_any, const Tensor& keys, const Tensor& values,
                           int64_t length, std::optional<double> scale) {
  constexpr const char* kOp = "decode_attention";
  check_float(kOp, "q", q_any);
  OW_CHECK(q_any.dim() == 4 && q_any.size(2) >= 1 && q_any.size(3) >= 1, kOp,
           ": q must be [b, t, h, d] with h and d at least 1, got ", shape_text(q_any));
  const int64_t b = q_any.size(0);
  const int64_t t = q_any.size(1);
  const int64_t h = q_any.size(2);
  const int64_t d = q_any.size(3);
  check_defined(kOp, "keys", keys);
  OW_CHECK(keys.dim() == 4, kOp, ": keys must be [b, kv_heads, max_len, d], got ",
           shape_text(keys));
  const int64_t g = keys.size(1);
  OW_CHECK(g >= 1 && h % g == 0, kOp, ": q must have a multiple of kv_heads = ", g, " heads, got ",
           h);
  const int64_t max_len = keys.size(2);
  check_max_len(kOp, max_len);
  for (const auto& [name, cache] : {std::pair("keys", &keys), std::pair("values", &values)}) {
    check_dtype(kOp, name, *cache, q_any.scalar_type());
    check_shape(kOp, name, *cache, {b, g, max_len, d});
    check_last_stride(kOp, name, *cache);
  }
  OW_CHECK(length >= t && length <= max_len, kOp, ": length must be in ", t, " .. ", max_len,
           " (queries .. max_len), got ", length);
  Tensor y = fast_empty({b, t, h, d}, q_any.scalar_type());
  if (y.numel() == 0) return y;

  const Tensor q = as_contiguous(q_any);
  DecodeAttentionArgs args{};
  args.b = b;
  args.queries = t;
  args.heads = h;
  args.kv_heads = g;
  args.d = d;
  args.n = length;
  args.type = float_type(q);
  args.scale = float(scale.value_or(1.0 / __builtin_sqrt(double(d))));
  args.q = q.const_data_ptr();
  args.keys = keys.const_data_ptr();
  args.key_strides = {keys.stride(0), keys.stride(1), keys.stride(2)};
  args.values = values.const_data_ptr();
  args.value_strides = {values.stride(0), values.stride(1), values.stride(2)};
  args.y = y.mutable_data_ptr();
  const int64_t states = decode_attention_state_count(args);
  const Workspace workspace(states * 4);
  args.states = workspace.scratch().take<float>(states);
  decode_attention(args, active_isa(), torch_parallel());
  return y;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "decode_attention(Tensor q, Tensor keys, Tensor values, int length, float? scale=None) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&ow::decode_attention_op));
}
