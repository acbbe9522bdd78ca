#include <tuple>

#include "ops/cache.h"

namespace ow {
namespace {

struct Attended {
  Tensor y;
  std::optional<Tensor> lse;
};

Attended attend(const char* op, const Tensor& q_any, const Tensor& keys, const Tensor& values,
                int64_t length, std::optional<double> scale, bool wants_lse) {
  check_float(op, "q", q_any);
  OW_CHECK(q_any.dim() == 4 && q_any.size(2) >= 1 && q_any.size(3) >= 1, op,
           ": q must be [b, t, h, d] with h and d at least 1, got ", shape_text(q_any));
  const int64_t b = q_any.size(0);
  const int64_t t = q_any.size(1);
  const int64_t h = q_any.size(2);
  const int64_t d = q_any.size(3);
  check_defined(op, "values", values);
  OW_CHECK(values.dim() == 4 && values.size(3) >= 1, op,
           ": values must be [b, kv_heads, max_len, dv] with dv at least 1, got ",
           shape_text(values));
  const int64_t dv = values.size(3);
  const int64_t g = check_cache(op, keys, values, b, d, dv, q_any.scalar_type());
  OW_CHECK(g >= 1 && h % g == 0, op, ": q must have a multiple of kv_heads = ", g, " heads, got ",
           h);
  const int64_t max_len = keys.size(2);
  OW_CHECK(length >= t && length <= max_len, op, ": length must be in ", t, " .. ", max_len,
           " (queries .. max_len), got ", length);
  Attended result{fast_empty({b, t, h, dv}, q_any.scalar_type()), std::nullopt};
  if (wants_lse) result.lse = fast_empty({b, t, h}, ScalarType::Float);
  if (result.y.numel() == 0) return result;

  const Tensor q = as_contiguous(q_any);
  DecodeAttentionArgs args = attention_over(keys, values, b, t, h, d, length, scale);
  args.q = q.const_data_ptr();
  args.y = result.y.mutable_data_ptr();
  if (wants_lse) args.lse = static_cast<float*>(result.lse->mutable_data_ptr());
  const int64_t states = decode_attention_state_count(args);
  const Workspace workspace(states * 4);
  args.states = workspace.scratch().take<float>(states);
  decode_attention(args, active_isa(), torch_parallel());
  return result;
}

Tensor decode_attention_op(const Tensor& q, const Tensor& keys, const Tensor& values,
                           int64_t length, std::optional<double> scale) {
  return attend("decode_attention", q, keys, values, length, scale, false).y;
}

std::tuple<Tensor, Tensor> decode_attention_lse(const Tensor& q, const Tensor& keys,
                                                const Tensor& values, int64_t length,
                                                std::optional<double> scale) {
  const Attended result = attend("decode_attention_lse", q, keys, values, length, scale, true);
  return {result.y, *result.lse};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "decode_attention(Tensor q, Tensor keys, Tensor values, int length, float? scale=None) -> "
      "Tensor");
  m.def(
      "decode_attention_lse(Tensor q, Tensor keys, Tensor values, int length, float? scale=None) "
      "-> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&ow::decode_attention_op));
  m.impl("decode_attention_lse", TORCH_BOX(&ow::decode_attention_lse));
}
