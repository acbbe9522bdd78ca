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
  const T* query_row(const DecodeAttentionArgs& a, int64_t row) const {
    const int64_t query = item / a.kv_heads * a.queries + row / group_of(a);
    const int64_t head = item % a.kv_heads * group_of(a) + row % group_of(a);
    return static_cast<const T*>(a.q) + (query * a.heads + head) * a.d;
  }
  float* state(const DecodeAttentionArgs& a, int64_t row) const {
    return states + row * state_size(a);
  }
};

// Rows that are taken through a chunk together.
constexpr int64_t kMaxRows = 16;

// Up to kMaxRows rows and one chunk.
template <class T>
class ChunkRows {
 public:
  ChunkRows(const DecodeAttentionArgs& a, const Chunk<T>& chunk, int64_t first)
      : a_(a), chunk_(chunk), fetches_(first == 0), count_(min_of(kMaxRows, rows_of(a) - first)) {
    for (int64_t r = 0; r < count_; ++r) {
      q_[r] = chunk.query_row(a, first + r);
      state_[r] = chunk.state(a, first + r);
      seen_[r] = chunk.seen_by(a, (first + r) / group_of(a));
    }
  }

  void attend() {
    for_each_block(chunk_.keys, chunk_.key_stride, a_.d,
                   [&](const T* keys, int64_t key, int64_t r, int64_t keys_seen, auto rows,
                       const Ahead& ahead) {
                     constexpr int kRows = decltype(rows)::kRows;
                     float* to[kRows];
                     for (int i = 0; i < kRows; ++i) to[i] = scores_[r + i] + key;
                     score_keys<kRows>(q_ + r, keys, chunk_.key_stride, keys_seen, a_.d, a_.scale,
                                       to, ahead);
                   });
    for (int64_t r = 0; r < count_; ++r) soften(scores_[r], seen_[r], a_.dv, state_[r]);
    for_each_block(chunk_.values, chunk_.value_stride, a_.dv,
                   [&](const T* values, int64_t key, int64_t r, int64_t keys_seen, auto rows,
                       const Ahead& ahead) {
                     constexpr int kRows = decltype(rows)::kRows;
                     const float* weights[kRows];
                     for (int i = 0; i < kRows; ++i) weights[i] = scores_[r + i] + key;
                     sum_values<kRows>(weights, values, chunk_.value_stride, keys_seen, a_.dv,
                                       state_ + r, ahead);
                   });
  }

 private:
  // Calls body(the block's first key or value, its place in the chunk, first row, what the rows see
  // of the block, RowCount<rows>, ahead).
  template <class Body>
  void for_each_block(const T* from, int64_t stride, int64_t d, const Body& body) const {
    // The last row sees the most.
    for (int64_t key = 0; key < seen_[count_ - 1]; key += kKeyBlock) {
      const T* block = from + key * stride;
      const Ahead ahead = fetches_ ? Ahead(block + kKeyBlock * stride, stride, d) : Ahead{};
      for (int64_t r = 0; r < count_;) {
        // Of one query, whose rows see the same keys.
        int64_t same = 1;
        while (same < min_of(kRowBlock, count_ - r) && seen_[r + same] == seen_[r]) ++same;
        const int64_t seen = min_of(kKeyBlock, seen_[r] - key);
        with_row_count(
            same, [&](auto rows) { body(block, key, r, seen, rows, ahead.part(r, same, count_)); });
        r += same;
      }
    }
  }

  const DecodeAttentionArgs& a_;
  const Chunk<T>& chunk_;
  bool fetches_;
  int64_t count_;
  const T* q_[kMaxRows];
  float* state_[kMaxRows];
  int64_t seen_[kMaxRows];  // keys of the chunk
  alignas(64) float scores_[kMaxRows][kKeyChunk];
};

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
    for (int64_t row = 0; row < rows_of(a); row += kMaxRows) ChunkRows<T>(a, chunk, row).attend();
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
