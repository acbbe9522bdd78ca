#include "ops/cache.h"

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
  const int64_t g = check_cache(kOp, keys, values, b, d, q_any.scalar_type());
  OW_CHECK(g >= 1 && h % g == 0, kOp, ": q must have a multiple of kv_heads = ", g, " heads, got ",
           h);
  const int64_t max_len = keys.size(2);
  OW_CHECK(length >= t && length <= max_len, kOp, ": length must be in ", t, " .. ", max_len,
           " (queries .. max_len), got ", length);
  Tensor y = fast_empty({b, t, h, d}, q_any.scalar_type());
  if (y.numel() == 0) return y;

  const Tensor q = as_contiguous(q_any);
  DecodeAttentionArgs args = attention_over(keys, values, b, t, h, d, length, scale);
  args.q = q.const_data_ptr();
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
