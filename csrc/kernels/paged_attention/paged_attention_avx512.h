// What the tiers from avx512 on, but for tiles, read the sides of a chunk with.
#pragma once

#include "kernels/paged_attention/paged_attention_codes_avx512.h"
#include "kernels/paged_attention/paged_attention_rows_body.h"

namespace ow::OW_TARGET {
namespace {

// Products of codes where a side's format has them; rows or panels of floats for the rest.
template <int kDigits>
class Products {
 public:
  void take(const Rows&) {}

  void score(Rows* rows, const Chunk& chunk, PagesAhead values) {
    const KVSide& side = rows->a.kv.keys;
    if (chunk.newest || rows->a.cos != nullptr || !has_key_products(side)) {
      return floats_.score(rows, chunk, values);
    }
    with_bits(side.bits, [&](auto bits) {
      codes_.template score<decltype(bits)::kValue>(rows, chunk, &values);
    });
  }

  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead keys) {
    const KVSide& side = rows->a.kv.values;
    if (chunk.newest || !has_value_products(side)) {
      return floats_.add_values(rows, chunk, states, keys);
    }
    with_bits(side.bits, [&](auto bits) {
      codes_.template add_values<decltype(bits)::kValue>(rows, chunk, states, &keys);
    });
  }

 private:
  FloatSides floats_;
  CodeRows<kDigits> codes_;
};

void attend_products(const PagedAttentionArgs& a, int64_t begin, int64_t end) {
  with_digits(a.kv.type,
              [&](auto digits) { attend<Products<decltype(digits)::kValue>>(a, begin, end); });
}

}  // namespace
}  // namespace ow::OW_TARGET
