// Keys and values that lie as rows of floats, read where they are.
#pragma once

#include "kernels/paged_attention/paged_attention_body.h"

namespace ow::OW_TARGET {
namespace {

// Rows of floats; panels where a token need not be in a page, or not be seen, and for the rest.
class FloatSides {
 public:
  void take(const Rows&) {}

  void score(Rows* rows, const Chunk& chunk, PagesAhead values) {
    const PagedAttentionArgs& a = rows->a;
    if (chunk.newest || a.cos != nullptr || !is_dense(a.kv.keys)) {
      return panels_.score(rows, chunk, values);
    }
    with_type(a.kv.type, a.q, [&]<class T>(const T* all_q) {
      const int64_t d = a.kv.keys.d;
      const T* q[kMaxRows];
      for (int64_t r = 0; r < rows->count; ++r) q[r] = all_q + rows->place(r) * d;
      for_each_panel<T>(a, a.kv.keys, chunk, values, [&](const T* keys, int64_t i, Ahead ahead) {
        for_each_row_block(rows->count, [&](int64_t r, auto count) {
          constexpr int kRows = decltype(count)::kRows;
          float* to[kRows];
          for (int j = 0; j < kRows; ++j) to[j] = rows->scores[r + j] + i * kPanelTokens;
          score_keys<kRows>(q + r, keys, d, kPanelTokens, d, a.scale, to,
                            ahead.part(r, kRows, rows->count));
        });
      });
    });
  }

  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead keys) {
    const PagedAttentionArgs& a = rows->a;
    if (chunk.newest || !is_dense(a.kv.values)) {
      return panels_.add_values(rows, chunk, states, keys);
    }
    with_type(a.kv.type, nullptr, [&]<class T>(const T*) {
      const int64_t d = a.kv.values.d;
      for_each_panel<T>(a, a.kv.values, chunk, keys, [&](const T* values, int64_t i, Ahead ahead) {
        for_each_row_block(rows->count, [&](int64_t r, auto count) {
          constexpr int kRows = decltype(count)::kRows;
          const float* weights[kRows];
          float* to[kRows];
          for (int j = 0; j < kRows; ++j) {
            weights[j] = rows->scores[r + j] + i * kPanelTokens;
            to[j] = states + (r + j) * state_size(a);
          }
          sum_values<kRows>(weights, values, d, kPanelTokens, d, to,
                            ahead.part(r, kRows, rows->count));
        });
      });
    });
  }

 private:
  static_assert(kPanelTokens == kKeyBlock);

  // Calls body(rows of the panel, its number, the rows that follow): after the chunk's last panel
  // those of the other side.
  template <class T, class Body>
  static void for_each_panel(const PagedAttentionArgs& a, const KVSide& side, const Chunk& chunk,
                             const PagesAhead& other, const Body& body) {
    const auto rows_of_panel = [&](int64_t i) {
      return reinterpret_cast<const T*>(dense_row(a, side, chunk.panel[i]));
    };
    for (int64_t i = 0; i < chunk.panels; ++i) {
      const auto* next = i + 1 < chunk.panels ? rows_of_panel(i + 1)
                                              : reinterpret_cast<const T*>(other.first_row());
      body(rows_of_panel(i), i, next == nullptr ? Ahead{} : Ahead(next, side.d, side.d));
    }
  }

  Panels panels_;
};

}  // namespace
}  // namespace ow::OW_TARGET
