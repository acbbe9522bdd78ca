// Keys and values of earlier tokens as arguments of an operator.
#pragma once

#include "kernels/decode_attention/decode_attention.h"
#include "ops/glue.h"

namespace ow {

// keys must be [b, kv_heads, max_len, d] of `type`, and values alike with a last dimension of dv;
// gives kv_heads.
inline int64_t check_cache(const char* op, const Tensor& keys, const Tensor& values, int64_t b,
                           int64_t d, int64_t dv, ScalarType type) {
  check_defined(op, "keys", keys);
  OW_CHECK(keys.dim() == 4, op, ": keys must be [b, kv_heads, max_len, d], got ", shape_text(keys));
  const int64_t g = keys.size(1);
  const int64_t max_len = keys.size(2);
  // A view that repeats one token may claim any number of them.
  OW_CHECK(max_len < int64_t{1} << 31, op, ": keys must have fewer than 2^31 tokens, got ",
           max_len);
  const auto check_half = [&](const char* name, const Tensor& half, int64_t last) {
    check_dtype(op, name, half, type);
    check_shape(op, name, half, {b, g, max_len, last});
    check_last_stride(op, name, half);
  };
  check_half("keys", keys, d);
  check_half("values", values, dv);
  return g;
}

// There must be room for t tokens at `position`.
inline void check_position(const char* op, const Tensor& keys, int64_t t, int64_t position) {
  const int64_t last = keys.size(2) - t;
  OW_CHECK(position >= 0 && position <= last, op, ": position must be in 0 .. ", last,
           " (max_len less the tokens of x), got ", position);
}

// Of queries [b, queries, heads, d] over the first n tokens; q, states, y and lse are still to be
// set.
inline DecodeAttentionArgs attention_over(const Tensor& keys, const Tensor& values, int64_t b,
                                          int64_t queries, int64_t heads, int64_t d, int64_t n,
                                          std::optional<double> scale) {
  DecodeAttentionArgs args{};
  args.b = b;
  args.queries = queries;
  args.heads = heads;
  args.kv_heads = keys.size(1);
  args.d = d;
  args.dv = values.size(3);
  args.n = n;
  args.type = float_type(keys);
  args.scale = float(scale.value_or(1.0 / __builtin_sqrt(double(d))));
  args.keys = keys.const_data_ptr();
  args.key_strides = {keys.stride(0), keys.stride(1), keys.stride(2)};
  args.values = values.const_data_ptr();
  args.value_strides = {values.stride(0), values.stride(1), values.stride(2)};
  return args;
}

}  // namespace ow
