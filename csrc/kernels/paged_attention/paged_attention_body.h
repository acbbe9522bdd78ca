// Paged attention in terms of simd/attention.h; each paged_attention_<tier>.cpp compiles it once,
// with what reads the sides of a chunk: class Panels, or one of the tier's own.
#pragma once

#include "kernels/paged_attention/paged_attention_panels_body.h"

namespace ow::OW_TARGET {
namespace {

// Rows that are taken through a chunk together.
constexpr int64_t kMaxRows = 64;

// The rows of one head, and their scores of a chunk.
struct Rows {
  const PagedAttentionArgs& a;
  int64_t item = -1;
  int64_t first = 0;
  int64_t count = 0;
  alignas(64) float q[kMaxRows][kMaxPagedD];
  alignas(64) float scores[kMaxRows][kChunkTokens];

  explicit Rows(const PagedAttentionArgs& args) : a(args) {}

  // False if they are the rows already here.
  bool take(int64_t new_item, int64_t new_first) {
    if (item == new_item && first == new_first) return false;
    item = new_item;
    first = new_first;
    count = min_of(kMaxRows, rows_of(a) - first);
    for (int64_t r = 0; r < count; ++r) {
      read_floats(a.q, a.kv.type, place(r) * a.kv.keys.d, a.kv.keys.d, q[r]);
    }
    return true;
  }
  // Of row r among all [b, queries, heads].
  int64_t place(int64_t r) const {
    const int64_t query = item / a.kv.kv_heads * a.queries + (first + r) / group_of(a);
    return query * a.heads + item % a.kv.kv_heads * group_of(a) + (first + r) % group_of(a);
  }
  // Tokens of the chunk that row r sees.
  int64_t seen(const Chunk& chunk, int64_t r) const {
    if (!chunk.newest) return chunk.tokens;
    const int64_t query = (first + r) / group_of(a);
    const int64_t end = a.kv.lengths[item] - a.queries + query + 1 - chunk.panel[0].token;
    return end < 0 ? 0 : min_of(end, chunk.tokens);
  }
};

// scores[r][j] = scale * q_r . key_j of 32 keys.
template <int kCount>
void score_panel(const float (*q)[kMaxPagedD], const KeyPanel& keys, int64_t d, float scale,
                 float (*scores)[kChunkTokens]) {
  constexpr int kVecs = int(kPanelTokens / kLanes) < 4 ? int(kPanelTokens / kLanes) : 4;
  for (int64_t n = 0; n < kPanelTokens; n += kVecs * kLanes) {
    VecF acc[kCount][kVecs];
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVecs; ++v) acc[r][v] = set1(0.0f);
    }
    for (int64_t c = 0; c < d; ++c) {
      VecF key[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) key[v] = load(keys.at[c] + n + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kCount; ++r) {
        const VecF factor = set1(q[r][c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(factor, key[v], acc[r][v]);
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        store(scores[r] + n + v * kLanes, mul(acc[r][v], set1(scale)));
      }
    }
  }
}

// Turns the scores of a chunk into weights.
void soften_rows(Rows* rows, const Chunk& chunk, float* states) {
  const int64_t dv = rows->a.kv.values.d;
  const int64_t size = state_size(rows->a);
  if (chunk.newest) {
    // Rows of different queries may see different tokens.
    for (int64_t r = 0; r < rows->count; ++r) {
      soften(rows->scores[r], rows->seen(chunk, r), dv, states + r * size);
    }
    return;
  }
  for_each_row_block(rows->count, [&](int64_t first, auto count) {
    constexpr int kCount = decltype(count)::kRows;
    float *scores[kCount], *state[kCount];
    for (int r = 0; r < kCount; ++r) {
      scores[r] = rows->scores[first + r];
      state[r] = states + (first + r) * size;
    }
    soften<kCount>(scores, chunk.tokens, dv, state);
  });
}

// Any format, by way of panels of fp32.
class Panels {
 public:
  void take(const Rows&) {}

  void score(Rows* rows, const Chunk& chunk, PagesAhead values) {
    const PanelReader reader(rows->a);
    KeyPanel panel;
    for (int64_t i = 0; i < chunk.panels; ++i) {
      values.fetch(lines_of(rows->a, rows->a.kv.values));
      reader.keys(chunk, i, &panel);
      for_each_row_block(rows->count, [&](int64_t r, auto count) {
        score_panel<decltype(count)::kRows>(rows->q + r, panel, rows->a.kv.keys.d, rows->a.scale,
                                            shifted(rows->scores + r, i * kPanelTokens));
      });
    }
  }

  void add_values(Rows* rows, const Chunk& chunk, float* states, PagesAhead keys) {
    const PanelReader reader(rows->a);
    ValuePanel panel;
    for (int64_t i = 0; i < chunk.panels; ++i) {
      keys.fetch(lines_of(rows->a, rows->a.kv.keys));
      reader.values(chunk, i, &panel);
      if (!chunk.newest) {
        for_each_row_block(rows->count, [&](int64_t r, auto count) {
          add_panel(rows, r, count, panel, i, kPanelTokens, states);
        });
        continue;
      }
      // Rows of different queries may see different tokens.
      for (int64_t r = 0; r < rows->count; ++r) {
        const int64_t seen = rows->seen(chunk, r) - i * kPanelTokens;
        add_panel(rows, r, RowCount<1>{}, panel, i, min_of(seen, kPanelTokens), states);
      }
    }
  }

 private:
  // Of one panel of a side, about.
  static int64_t lines_of(const PagedAttentionArgs& a, const KVSide& side) {
    const int64_t bits = is_dense(side) ? 8 * float_size(a.kv.type) : side.bits + 2;
    return div_up(kPanelTokens * side.d * bits, 512);
  }
  static float (*shifted(float (*scores)[kChunkTokens], int64_t tokens))[kChunkTokens] {
    return reinterpret_cast<float(*)[kChunkTokens]>(scores[0] + tokens);
  }
  template <class Count>
  static void add_panel(Rows* rows, int64_t r, Count, const ValuePanel& panel, int64_t i,
                        int64_t seen, float* states) {
    const float* weights[Count::kRows];
    float* out[Count::kRows];
    for (int j = 0; j < Count::kRows; ++j) {
      weights[j] = rows->scores[r + j] + i * kPanelTokens;
      out[j] = states + (r + j) * state_size(rows->a);
    }
    sum_values<Count::kRows>(weights, panel.at[0], kMaxPagedD, seen, rows->a.kv.values.d, out,
                             Ahead{});
  }
};

// The head of a span, `from` or one after it.
OW_INLINE int64_t item_of(const PagedAttentionArgs& a, int64_t from, int64_t span) {
  while (a.spans[from + 1] <= span) ++from;
  return from;
}

template <class Sides>
void attend(const PagedAttentionArgs& a, int64_t begin, int64_t end) {
  Rows rows(a);
  Sides sides;
  int64_t item = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    item = item_of(a, item, unit);
    float* states = a.states + unit * rows_of(a) * state_size(a);
    clear_states(states, state_size(a), rows_of(a), a.kv.values.d);
    for (int64_t first = 0; first < rows_of(a); first += kMaxRows) {
      if (rows.take(item, first)) sides.take(rows);
      Chunks chunks(a, item, unit - a.spans[item]);
      Chunk chunk[2];
      bool more = chunks.next(&chunk[0]);
      for (int i = 0; more; i ^= 1) {
        float* state = states + first * state_size(a);
        sides.score(&rows, chunk[i], PagesAhead(a, a.kv.values, chunk[i]));
        soften_rows(&rows, chunk[i], state);
        more = chunks.next(&chunk[i ^ 1]);
        // Of the next span, to be fetched.
        if (!more && unit + 1 < end) {
          const int64_t next = item_of(a, item, unit + 1);
          Chunks(a, next, unit + 1 - a.spans[next]).next(&chunk[i ^ 1]);
        }
        sides.add_values(&rows, chunk[i], state, PagesAhead(a, a.kv.keys, chunk[i ^ 1]));
      }
    }
  }
}

void merge(const PagedAttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t rows = rows_of(a);
  const int64_t dv = a.kv.values.d;
  for (int64_t unit = begin * rows; unit < end * rows; ++unit) {
    const int64_t item = unit / rows;
    const int64_t row = unit % rows;
    const int64_t query = item / a.kv.kv_heads * a.queries + row / group_of(a);
    const int64_t to = query * a.heads + item % a.kv.kv_heads * group_of(a) + row % group_of(a);
    float* states = a.states + (a.spans[item] * rows + row) * state_size(a);
    a.lse[to] = with_type(a.kv.type, a.y, [&]<class T>(const T*) {
      return merge_states(states, rows * state_size(a), a.spans[item + 1] - a.spans[item], dv,
                          static_cast<T*>(a.y) + to * dv);
    });
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
