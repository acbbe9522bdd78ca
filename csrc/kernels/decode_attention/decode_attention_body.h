// Decode attention in terms of simd/vec.h; each decode_attention_<tier>.cpp compiles it once.
#pragma once

#include "kernels/decode_attention/decode_attention.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Rows that share the loads of a key or value, and vectors of dimensions whose sums of values a
// pass over the values makes: 16 accumulators, half of the registers of AVX-512. (AVX2 spills
// some.)
constexpr int kRowBlock = 4;
constexpr int kVectors = 4;

constexpr float kMinusInfinity = -__builtin_inff();

template <class T>
OW_INLINE VecF load_up_to(const T* p, int64_t lanes) {
  return lanes >= kLanes ? load(p) : load_n(p, lanes);
}

// scores[r][j] = scale * q_r . key_j
template <class T, int kRows>
void score_keys(const T* const* q, const T* keys, int64_t stride, int64_t count, int64_t d,
                float scale, float (*scores)[kKeyChunk]) {
  for (int64_t j = 0; j < count; ++j) {
    const T* key = keys + j * stride;
    VecF acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = set1(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
      const VecF k = load(key + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r] = fma(load(q[r] + i), k, acc[r]);
    }
    if (i < d) {
      const VecF k = load_n(key + i, d - i);
      for (int r = 0; r < kRows; ++r) acc[r] = fma(load_n(q[r] + i, d - i), k, acc[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) scores[r][j] = scale * sum(acc[r]);
  }
}

// out[r][i] = sum_j weights[r][j] * value_j[i]
template <class T, int kRows>
void sum_values(const float (*weights)[kKeyChunk], const T* values, int64_t stride, int64_t count,
                int64_t d, float* const* out) {
  for (int64_t begin = 0; begin < d; begin += kVectors * kLanes) {
    const int64_t size = min_of(kVectors * kLanes, d - begin);
    VecF acc[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = set1(0.0f);
    }
    const auto add_value = [&](int64_t j, auto load_at) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const VecF value = load_at(values + j * stride + begin + v * kLanes, v);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(set1(weights[r][j]), value, acc[r][v]);
      }
    };
    if (size == kVectors * kLanes) {
      for (int64_t j = 0; j < count; ++j) add_value(j, [](const T* p, int) { return load(p); });
    } else {
      for (int64_t j = 0; j < count; ++j) {
        add_value(j, [&](const T* p, int v) {
          const int64_t lanes = size - v * kLanes;
          return lanes > 0 ? load_up_to(p, lanes) : set1(0.0f);
        });
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v * kLanes < size; ++v) {
        store_n(out[r] + begin + v * kLanes, acc[r][v], min_of(kLanes, size - v * kLanes));
      }
    }
  }
}

// Turns scores into e^(score - m); gives m and the sum.
OW_INLINE void soften(float* scores, int64_t count, float* m, float* l) {
  float largest = kMinusInfinity;
  for (int64_t j = 0; j < count; ++j) largest = scores[j] > largest ? scores[j] : largest;
  VecF total = set1(0.0f);
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t lanes = min_of(kLanes, count - j);
    const VecF score = load_n(scores + j, lanes);
    const VecF weight = exp_(sub(score, set1(largest)));
    // exp_ has no NaN to give; a score that is not finite minus itself is one.
    store_n(scores + j, add(weight, sub(score, score)), lanes);
    total = add(total, load_n(scores + j, lanes));
  }
  *m = largest;
  *l = sum(total);
}

// States of kRows heads of one query, which see the same keys.
template <class T, int kRows>
void attend_rows(const DecodeAttentionArgs& a, int64_t item, int64_t chunk, int64_t query,
                 int64_t head_in_group) {
  const int64_t b = item / a.kv_heads;
  const int64_t kv_head = item % a.kv_heads;
  const int64_t begin = chunk * kKeyChunk;
  const int64_t seen = min_of(a.n - a.queries + query + 1, begin + kKeyChunk);
  const int64_t count = seen > begin ? seen - begin : 0;
  const T* q[kRows];
  float* state[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t head = kv_head * group_of(a) + head_in_group + r;
    const int64_t row = query * group_of(a) + head_in_group + r;
    q[r] = static_cast<const T*>(a.q) + ((b * a.queries + query) * a.heads + head) * a.d;
    state[r] = a.states + ((item * chunks_of(a) + chunk) * rows_of(a) + row) * state_size(a);
  }
  const T* keys = static_cast<const T*>(a.keys) + b * a.key_strides.b +
                  kv_head * a.key_strides.head + begin * a.key_strides.token;
  const T* values = static_cast<const T*>(a.values) + b * a.value_strides.b +
                    kv_head * a.value_strides.head + begin * a.value_strides.token;
  alignas(64) float scores[kRows][kKeyChunk];
  score_keys<T, kRows>(q, keys, a.key_strides.token, count, a.d, a.scale, scores);
  for (int r = 0; r < kRows; ++r) {
    soften(scores[r], count, state[r] + a.d, state[r] + a.d + 1);
  }
  sum_values<T, kRows>(scores, values, a.value_strides.token, count, a.d, state);
}

template <class T>
void attend(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t group = group_of(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / chunks_of(a);
    const int64_t chunk = unit % chunks_of(a);
    for (int64_t query = 0; query < a.queries; ++query) {
      int64_t head = 0;
      for (; head + kRowBlock <= group; head += kRowBlock) {
        attend_rows<T, kRowBlock>(a, item, chunk, query, head);
      }
      switch (group - head) {
        case 1: attend_rows<T, 1>(a, item, chunk, query, head); break;
        case 2: attend_rows<T, 2>(a, item, chunk, query, head); break;
        case 3: attend_rows<T, 3>(a, item, chunk, query, head); break;
      }
    }
  }
}

template <class T>
void merge(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  const int64_t stride = rows_of(a) * state_size(a);  // from chunk to chunk
  for (int64_t unit = begin * rows_of(a); unit < end * rows_of(a); ++unit) {
    const int64_t item = unit / rows_of(a);
    const int64_t row = unit % rows_of(a);
    float* states = a.states + (item * chunks_of(a) * rows_of(a) + row) * state_size(a);
    float largest = kMinusInfinity;
    for (int64_t c = 0; c < chunks_of(a); ++c) {
      const float m = states[c * stride + a.d];
      largest = m > largest ? m : largest;
    }
    VecF total = set1(0.0f);
    for (int64_t c = 0; c < chunks_of(a); ++c) {
      float* m = states + c * stride + a.d;
      // What the chunk counts, in the place of its m. A chunk the row does not see counts nothing.
      const VecF factor = *m == kMinusInfinity ? set1(0.0f) : exp_(set1(*m - largest));
      store_n(m, factor, 1);
      total = fma(factor, set1(m[1]), total);
    }
    const int64_t query = row / group_of(a);
    const int64_t head = item % a.kv_heads * group_of(a) + row % group_of(a);
    T* y = static_cast<T*>(a.y) + ((item / a.kv_heads * a.queries + query) * a.heads + head) * a.d;
    for (int64_t i = 0; i < a.d; i += kLanes) {
      const int64_t lanes = min_of(kLanes, a.d - i);
      VecF acc = set1(0.0f);
      for (int64_t c = 0; c < chunks_of(a); ++c) {
        const float* state = states + c * stride;
        acc = fma(set1(state[a.d]), load_n(state + i, lanes), acc);
      }
      store_n(y + i, div_(acc, total), lanes);
    }
  }
}

#define OW_BY_TYPE(function)                                    \
  switch (a.type) {                                             \
    case FloatType::f32: return function<float>(a, begin, end); \
    case FloatType::bf16: return function<bf16>(a, begin, end); \
    case FloatType::f16: return function<f16>(a, begin, end);   \
  }
void attend_any(const DecodeAttentionArgs& a, int64_t begin, int64_t end) { OW_BY_TYPE(attend) }
void merge_any(const DecodeAttentionArgs& a, int64_t begin, int64_t end) { OW_BY_TYPE(merge) }
#undef OW_BY_TYPE

}  // namespace
}  // namespace ow::OW_TARGET
