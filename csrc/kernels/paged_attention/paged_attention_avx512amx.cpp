#include "kernels/paged_attention/paged_attention_codes_avx512amx.h"
#include "kernels/paged_attention/paged_attention_rows_body.h"
#include "simd/attention_bf16_avx512amx.h"

namespace ow {
namespace avx512amx {
namespace {

// A side's pages fetched ahead as rows of the other side are computed with.
class RowsAhead {
 public:
  RowsAhead(PagesAhead* pages, int64_t lines) : pages_(pages), lines_(lines) {}
  void fetch(int64_t) const { pages_->fetch(lines_); }

 private:
  PagesAhead* pages_;
  int64_t lines_;  // for each row
};

// Calls body(first panel, panels) for runs of panels that follow each other in a page.
template <class Body>
OW_INLINE void for_each_run(const Chunk& chunk, const Body& body) {
  for (int64_t i = 0; i < chunk.panels;) {
    int64_t end = i + 1;
    while (end < chunk.panels && chunk.panel[end].in_page > 0) ++end;
    body(i, end - i);
    i = end;
  }
}

// Rows of bf16, as in decode_attention.
class Bf16Sides {
 public:
  void take(const Rows& rows) {
    const PagedAttentionArgs& a = rows.a;
    if (a.kv.type != FloatType::bf16) return;
    const bf16* q = static_cast<const bf16*>(a.q);
    for (int64_t r = 0; r < rows.count; r += kTileRows) {
      q_[r / kTileRows].pack(min_of(kTileRows, rows.count - r), a.kv.keys.d,
                             [&](int64_t i) { return q + rows.place(r + i) * a.kv.keys.d; });
    }
  }

  void score(Rows* rows, const Chunk& chunk, PagesAhead values) {
    const PagedAttentionArgs& a = rows->a;
    const RowsAhead ahead(&values, lines_of_row(a, a.kv.values));
    for_each_run(chunk, [&](int64_t i, int64_t panels) {
      const auto* keys = reinterpret_cast<const bf16*>(dense_row(a, a.kv.keys, chunk.panel[i]));
      for (int64_t r = 0; r < rows->count; r += kTileRows) {
        score_keys_bf16(q_[r / kTileRows], min_of(kTileRows, rows->count - r), keys, a.kv.keys.d,
                        panels * kPanelTokens, a.kv.keys.d, a.scale,
                        rows->scores[r] + i * kPanelTokens, kChunkTokens, ahead);
      }
    });
  }

  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead keys) {
    const PagedAttentionArgs& a = rows->a;
    const RowsAhead ahead(&keys, lines_of_row(a, a.kv.keys));
    for_each_run(chunk, [&](int64_t i, int64_t panels) {
      const auto* values = reinterpret_cast<const bf16*>(dense_row(a, a.kv.values, chunk.panel[i]));
      for (int64_t r = 0; r < rows->count; r += kTileRows) {
        sum_values_bf16<kMaxRun>(rows->scores[r] + i * kPanelTokens, kChunkTokens,
                                 min_of(kTileRows, rows->count - r), values, a.kv.values.d,
                                 panels * kPanelTokens, a.kv.values.d, states + r * state_size(a),
                                 state_size(a), ahead);
      }
    });
  }

 private:
  static constexpr int64_t kMaxRun = 128;  // tokens of a page

  static int64_t lines_of_row(const PagedAttentionArgs& a, const KVSide& side) {
    const int64_t bits = is_dense(side) ? 8 * float_size(a.kv.type) : side.bits + 2;
    return div_up(side.d * bits, 512);
  }

  PackedQueries<kMaxPagedD> q_[kMaxRows / kTileRows];
};

// What a side's format has products for; rows or panels of floats for the rest.
template <int kDigits>
class Tiles {
 public:
  void take(const Rows& rows) { bf16_.take(rows); }

  void score(Rows* rows, const Chunk& chunk, PagesAhead values) {
    const KVPages& kv = rows->a.kv;
    const bool plain = !chunk.newest && rows->a.cos == nullptr;
    if (plain && has_key_products(kv.keys)) {
      with_bits(kv.keys.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::kValue;
        if (!fill_a_tile(*rows)) return codes_.template score<kBits>(rows, chunk, &values);
        code_tiles_.template score<kBits>(rows, chunk, &values);
      });
    } else if (plain && is_dense(kv.keys) && kv.type == FloatType::bf16) {
      bf16_.score(rows, chunk, values);
    } else {
      floats_.score(rows, chunk, values);
    }
  }

  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead keys) {
    const KVPages& kv = rows->a.kv;
    if (!chunk.newest && has_value_products(kv.values)) {
      with_bits(kv.values.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::kValue;
        if (!fill_a_tile(*rows)) {
          return codes_.template add_values<kBits>(rows, chunk, states, &keys);
        }
        code_tiles_.template add_values<kBits>(rows, chunk, states, &keys);
      });
    } else if (!chunk.newest && is_dense(kv.values) && kv.type == FloatType::bf16) {
      bf16_.add_values(rows, chunk, states, keys);
    } else {
      floats_.add_values(rows, chunk, states, keys);
    }
  }

 private:
  // Tiles beat vectors from then on (three digits: 6 rows): they take the same time for fewer.
  static bool fill_a_tile(const Rows& rows) { return kDigits * rows.count >= kTileRows; }

  FloatSides floats_;
  CodeRows<kDigits> codes_;
  CodeTiles<kDigits> code_tiles_;
  Bf16Sides bf16_;
};

void attend_tiles(const PagedAttentionArgs& a, int64_t begin, int64_t end) {
  open_tiles();
  with_digits(a.kv.type,
              [&](auto digits) { attend<Tiles<decltype(digits)::kValue>>(a, begin, end); });
  close_tiles();
}

}  // namespace
}  // namespace avx512amx

const PagedAttentionKernels paged_attention_avx512amx = {avx512amx::attend_tiles, avx512amx::merge};

}  // namespace ow
