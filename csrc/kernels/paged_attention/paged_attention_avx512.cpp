#include "kernels/paged_attention/paged_attention_codes_avx512.h"

namespace ow {
namespace avx512 {
namespace {

// Products of codes where a side's format has them; panels of fp32 for the rest.
class Products {
 public:
  void take(const Rows&) {}

  void score(Rows* rows, const Chunk& chunk, PagesAhead values) {
    const KVSide& side = rows->a.kv.keys;
    if (chunk.newest || rows->a.cos != nullptr || !CodeSides::reads_keys(side)) {
      return panels_.score(rows, chunk, values);
    }
    with_bits(side.bits,
              [&](auto bits) { codes_.score<decltype(bits)::kValue>(rows, chunk, &values); });
  }

  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead keys) {
    const KVSide& side = rows->a.kv.values;
    if (chunk.newest || !CodeSides::reads_values(side)) {
      return panels_.add_values(rows, chunk, states, keys);
    }
    with_bits(side.bits, [&](auto bits) {
      codes_.add_values<decltype(bits)::kValue>(rows, chunk, states, &keys);
    });
  }

 private:
  Panels panels_;
  CodeSides codes_;
};

}  // namespace
}  // namespace avx512

const PagedAttentionKernels paged_attention_avx512 = {avx512::attend<avx512::Products>,
                                                      avx512::merge};

}  // namespace ow
