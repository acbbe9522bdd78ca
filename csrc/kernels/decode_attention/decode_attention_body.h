// Decode attention in terms of simd/attention.h; each decode_attention_<tier>.cpp compiles it once.
#pragma once

#include "kernels/decode_attention/decode_attention.h"
#include "simd/attention.h"

namespace ow::OW_TARGET {
namespace {

// One chunk of one item's keys and values.
template <class T>
struct Chunk {
  int64_t item, begin;
  const T* keys;  // of key `begin`
  const T* values;
  int64_t key_stride, value_stride;
  float* states;  // of the item's first row

  static Chunk of(const DecodeAttentionArgs& a, int64_t unit, int64_t begin) {
    const int64_t item = unit / spans_of(a);
    const auto from = [&](const void* cache, const CacheStrides& s) {
      return static_cast<const T*>(cache) + item / a.kv_heads * s.b + item % a.kv_heads * s.head +
             begin * s.token;
    };
    return {item,
            begin,
            from(a.keys, a.key_strides),
            from(a.values, a.value_strides),
            a.key_strides.token,
            a.value_strides.token,
            a.states + unit * rows_of(a) * state_size(a)};
  }
  // Keys of the chunk that a query sees; all rows of the item see those of query 0.
  int64_t seen_by(const DecodeAttentionArgs& a, int64_t query) const {
    const int64_t end = min_of(a.n - a.queries + query + 1, begin + kKeyChunk);
    return end > begin ? end - begin : 0;
  }
  // The values of the chunk, and the keys of the next.
  Ahead values_ahead(const DecodeAttentionArgs& a) const {
    return Ahead::of(values, value_stride, a.dv);
  }
  Ahead keys_ahead(const DecodeAttentionArgs& a) const {
    return Ahead::of(keys + kKeyChunk * key_stride, key_stride, a.d);
  }
  const T* query_row(const DecodeAttentionArgs& a, int64_t row) const {
    const int64_t query = item / a.kv_heads * a.queries + row / group_of(a);
    const int64_t head = item % a.kv_heads * group_of(a) + row % group_of(a);
    return static_cast<const T*>(a.q) + (query * a.heads + head) * a.d;
  }
  float* state(const DecodeAttentionArgs& a, int64_t row) const {
    return states + row * state_size(a);
  }
};

// Calls body(first row, RowCount<size>) over blocks of rows of one query, which see the same keys.
template <class Body>
OW_INLINE void for_each_query_block(const DecodeAttentionArgs& a, int64_t query, const Body& body) {
  for_each_row_block(group_of(a), [&](int64_t head, auto count) __attribute__((always_inline)) {
    body(query * group_of(a) + head, count);
  });
}

template <int kRows, class T>
void attend_rows(const DecodeAttentionArgs& a, const Chunk<T>& chunk, int64_t row, int64_t count,
                 bool first) {
  alignas(64) float buffer[kRows][kKeyChunk];
  const T* q[kRows];
  float* scores[kRows];
  float* state[kRows];
  for (int r = 0; r < kRows; ++r) {
    q[r] = chunk.query_row(a, row + r);
    scores[r] = buffer[r];
    state[r] = chunk.state(a, row + r);
  }
  score_keys<kRows>(q, chunk.keys, chunk.key_stride, count, a.d, a.scale, scores,
                    first ? chunk.values_ahead(a) : Ahead{});
  for (int r = 0; r < kRows; ++r) soften(scores[r], count, a.dv, state[r]);
  sum_values<kRows>(scores, chunk.values, chunk.value_stride, count, a.dv, state,
                    first ? chunk.keys_ahead(a) : Ahead{});
}

// Calls body(chunk) over the chunks of spans [begin, end), whose states are cleared first.
template <class T, class Body>
OW_INLINE void for_each_chunk(const DecodeAttentionArgs& a, int64_t begin, int64_t end,
                              const Body& body) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t span = unit % spans_of(a) * span_keys(a);
    clear_states(a.states + unit * rows_of(a) * state_size(a), rows_of(a), a.dv);
    for (int64_t key = span; key < min_of(span + span_keys(a), a.n); key += kKeyChunk) {
      body(Chunk<T>::of(a, unit, key));
    }
  }
}

template <class T>
void attend(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  for_each_chunk<T>(a, begin, end, [&](const Chunk<T>& chunk) {
    for (int64_t query = 0; query < a.queries; ++query) {
      for_each_query_block(a, query, [&](int64_t row, auto count) {
        attend_rows<decltype(count)::kRows>(a, chunk, row, chunk.seen_by(a, query), row == 0);
      });
    }
  });
}

template <class T>
void merge(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t rows = rows_of(a);
  const int64_t stride = rows * state_size(a);  // from span to span
  for (int64_t unit = begin * rows; unit < end * rows; ++unit) {
    const int64_t item = unit / rows;
    const int64_t row = unit % rows;
    float* states = a.states + (item * spans_of(a) * rows + row) * state_size(a);
    const int64_t query = item / a.kv_heads * a.queries + row / group_of(a);
    const int64_t head = item % a.kv_heads * group_of(a) + row % group_of(a);
    const int64_t to = query * a.heads + head;
    const float lse =
        merge_states(states, stride, spans_of(a), a.dv, static_cast<T*>(a.y) + to * a.dv);
    if (a.lse != nullptr) a.lse[to] = lse;
  }
}

#define OW_BY_TYPE(function)                                    \
  switch (a.type) {                                             \
    case FloatType::f32: return function<float>(a, begin, end); \
    case FloatType::bf16: return function<bf16>(a, begin, end); \
    case FloatType::f16: return function<f16>(a, begin, end);   \
  }
[[maybe_unused]] void attend_any(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  OW_BY_TYPE(attend)
}
void merge_any(const DecodeAttentionArgs& a, int64_t begin, int64_t end) { OW_BY_TYPE(merge) }
#undef OW_BY_TYPE

}  // namespace
}  // namespace ow::OW_TARGET
