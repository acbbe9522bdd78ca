// Reading, moving, bounding and scoring pages in terms of simd/vec.h; each kv_cache_<tier>.cpp
// compiles it once, with kv_cache_quantize_body.h, which writes them.
#pragma once

#include "kernels/kv_cache/kv_cache_quantize_body.h"

namespace ow::OW_TARGET {
namespace {

template <class In, class Out>
OW_INLINE void convert(const In* x, int64_t n, Out* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t lanes = min_of(kLanes, n - i);
    store_up_to(y + i, load_up_to(x + i, lanes), lanes);
  }
}

// x^ of one token, from pages of T.
template <class T, class Out>
void read_token(const PagesOfRow& row, int64_t token, Out* y) {
  const KVSide& s = row.s;
  if (is_dense(s)) {
    return convert(static_cast<const T*>(s.rows) + row.slot(token) * s.d, s.d, y);
  }
  uint8_t codes[kCodeRow];
  float levels[kMaxKVChannels];
  row.get_codes(token, codes);
  if (s.table == nullptr) {
    for (int64_t c = 0; c < s.d; ++c) levels[c] = float(codes[c]);
  } else {
    for (int64_t c = 0; c < s.d; ++c) levels[c] = s.table[codes[c]];
  }
  const T* scales = static_cast<const T*>(s.scales) + row.scale_at(token, 0);
  const T* mins = static_cast<const T*>(s.mins) + row.scale_at(token, 0);
  if (s.axis == KVAxis::channel) {
    for (int64_t c = 0; c < s.d; c += kLanes) {
      const int64_t lanes = min_of(kLanes, s.d - c);
      const VecF value = fma(load_up_to(levels + c, lanes), load_up_to(scales + c, lanes),
                             load_up_to(mins + c, lanes));
      store_up_to(y + c, value, lanes);
    }
  } else {
    for (int64_t begin = 0; begin < s.d; begin += s.group_size) {
      const int64_t at = begin / s.group_size * row.p.page_size;
      const VecF scale = set1(ow::to_float(scales[at]));
      const VecF min = set1(ow::to_float(mins[at]));
      const int64_t end = min_of(begin + s.group_size, s.d);
      for (int64_t c = begin; c < end; c += kLanes) {
        const int64_t lanes = min_of(kLanes, end - c);
        store_up_to(y + c, fma(load_up_to(levels + c, lanes), scale, min), lanes);
      }
    }
  }
  for (int64_t i = 0; i < s.outliers; ++i) {
    const int64_t at = row.slot(token) * s.outliers + i;
    const int64_t c = s.outlier_index[at];
    if (c < s.d) from_float(ow::to_float(static_cast<const T*>(s.outlier_values)[at]), y + c);
  }
}

template <class T, class Out>
void read_tokens(const PagesOfRow& row, int64_t first, int64_t count, Out* y) {
  for (int64_t t = 0; t < count; ++t) read_token<T>(row, first + t, y + t * row.s.d);
}

template <class Out>
void read_from_type(const PagesOfRow& row, int64_t first, int64_t count, Out* y) {
  switch (row.p.type) {
    case FloatType::f32: return read_tokens<float>(row, first, count, y);
    case FloatType::bf16: return read_tokens<bf16>(row, first, count, y);
    case FloatType::f16: return read_tokens<f16>(row, first, count, y);
  }
}

void read_any(const KVPages& p, KVPart part, int64_t r, int64_t first, int64_t count,
              FloatType type, void* y) {
  const PagesOfRow row(p, part, r);
  switch (type) {
    case FloatType::f32: return read_from_type(row, first, count, static_cast<float*>(y));
    case FloatType::bf16: return read_from_type(row, first, count, static_cast<bf16*>(y));
    case FloatType::f16: return read_from_type(row, first, count, static_cast<f16*>(y));
  }
}

void copy_bytes(void* base, int64_t to, int64_t from, int64_t count, int64_t size) {
  memmove(static_cast<char*>(base) + to * size, static_cast<char*>(base) + from * size,
          size_t(count * size));
}

// Scale and min of the group of `channel` that the token is in; on a channel axis those of every
// channel.
void move_grid(const PagesOfRow& row, int64_t from, int64_t to, int64_t channel, int64_t size) {
  const int64_t count = row.s.axis == KVAxis::channel ? row.s.d : 1;
  const int64_t source = row.scale_at(from, channel);
  const int64_t target = row.scale_at(to, channel);
  copy_bytes(row.s.scales, target, source, count, size);
  copy_bytes(row.s.mins, target, source, count, size);
}

void move_any(const KVPages& p, KVPart part, int64_t r, int64_t from, int64_t to, int64_t count) {
  const PagesOfRow row(p, part, r);
  const KVSide& s = row.s;
  const int64_t size = float_size(p.type);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t source = row.slot(from + t);
    const int64_t target = row.slot(to + t);
    if (is_dense(s)) {
      copy_bytes(s.rows, target * s.d, source * s.d, s.d, size);
      continue;
    }
    uint8_t codes[kCodeRow] = {};
    row.get_codes(from + t, codes);
    row.put_codes(to + t, codes);
    if (s.axis == KVAxis::token) {
      for (int64_t c = 0; c < s.d; c += s.group_size) move_grid(row, from + t, to + t, c, size);
    } else if (t % s.group_size == 0) {
      move_grid(row, from + t, to + t, 0, size);
    }
    if (s.outliers > 0) {
      copy_bytes(s.outlier_index, target * s.outliers, source * s.outliers, s.outliers, 1);
      copy_bytes(s.outlier_values, target * s.outliers, source * s.outliers, s.outliers, size);
    }
  }
}

// Dense keys are of type T already; what others become in fp32 is rounded outwards.
template <class T>
OW_INLINE void store_bounds(const float* values, int64_t d, bool exact, bool up, T* out) {
  if (exact) return convert(values, d, out);
  for (int64_t c = 0; c < d; ++c) out[c] = rounded<T>(values[c], up);
}

template <class T>
void bound_tokens(const PagesOfRow& row, int64_t first, int64_t end) {
  const int64_t d = row.s.d;
  float low[kMaxKVChannels], high[kMaxKVChannels], x[kMaxKVChannels];
  for (int64_t chunk = first / kBoundTokens; chunk * kBoundTokens < end; ++chunk) {
    const int64_t begin = chunk * kBoundTokens;
    const int64_t last = min_of(begin + kBoundTokens, end);
    for (int64_t token = begin; token < last; ++token) {
      read_token<T>(row, token, x);
      for (int64_t c = 0; c < d; c += kLanes) {
        const int64_t lanes = min_of(kLanes, d - c);
        const VecF value = load_up_to(x + c, lanes);
        const bool fresh = token == begin;
        store_up_to(low + c, fresh ? value : smaller(load_up_to(low + c, lanes), value), lanes);
        store_up_to(high + c, fresh ? value : max_(load_up_to(high + c, lanes), value), lanes);
      }
    }
    const int64_t at = row.slot(begin) / kBoundTokens * d;
    store_bounds(low, d, is_dense(row.s), false, static_cast<T*>(row.p.key_min) + at);
    store_bounds(high, d, is_dense(row.s), true, static_cast<T*>(row.p.key_max) + at);
  }
}

void bound_any(const KVPages& p, int64_t r, int64_t first, int64_t end) {
  const PagesOfRow row(p, KVPart::keys, r);
  switch (p.type) {
    case FloatType::f32: return bound_tokens<float>(row, first, end);
    case FloatType::bf16: return bound_tokens<bf16>(row, first, end);
    case FloatType::f16: return bound_tokens<f16>(row, first, end);
  }
}

// Queries that share a pass over the bounds, and so their loads: with a sum for each of the two
// products, enough chains to hide the latency of a multiply-add. (Dot products of bf16 took a tenth
// longer on Granite Rapids.)
constexpr int64_t kScoreQueries = 4;

// sum_c max(q min, q max) of kQueries queries from `first` on.
template <int kQueries, class T>
OW_INLINE void bound_products(const PageScoreArgs& a, int64_t first, const T* low, const T* high,
                              float* products) {
  const int64_t d = a.pages->keys.d;
  const float* positive = a.q_positive + first * d;
  const float* negative = a.q_negative + first * d;
  VecF tops[kQueries], bottoms[kQueries];
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) tops[i] = bottoms[i] = set1(0.0f);
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t lanes = min_of(kLanes, d - c);
    const VecF top = load_up_to(high + c, lanes);
    const VecF bottom = load_up_to(low + c, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      tops[i] = fma(load_up_to(positive + i * d + c, lanes), top, tops[i]);
      bottoms[i] = fma(load_up_to(negative + i * d + c, lanes), bottom, bottoms[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kQueries; ++i) products[i] = sum(add(tops[i], bottoms[i]));
}

// Bounds of a whole page from those of its tokens.
template <class T>
OW_INLINE void widen_bounds(const T* low, const T* high, int64_t chunks, int64_t d, float* lowest,
                            float* highest) {
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t lanes = min_of(kLanes, d - c);
    VecF bottom = load_up_to(low + c, lanes);
    VecF top = load_up_to(high + c, lanes);
    for (int64_t i = 1; i < chunks; ++i) {
      bottom = smaller(bottom, load_up_to(low + i * d + c, lanes));
      top = max_(top, load_up_to(high + i * d + c, lanes));
    }
    store_up_to(lowest + c, bottom, lanes);
    store_up_to(highest + c, top, lanes);
  }
}

// The bounds of one page: of each `chunks` 16 tokens, d apart.
template <class T>
struct PageBounds {
  const T* low;
  const T* high;
  int64_t chunks;
};

// The largest product of each of kQueries queries, joined to `score`.
template <int kQueries, class T>
OW_INLINE float join_score(const PageScoreArgs& a, int64_t first, const PageBounds<T>& page,
                           float score) {
  const int64_t d = a.pages->keys.d;
  float best[kQueries], products[kQueries];
  bound_products<kQueries>(a, first, page.low, page.high, best);
  for (int64_t i = 1; i < page.chunks; ++i) {
    bound_products<kQueries>(a, first, page.low + i * d, page.high + i * d, products);
    for (int j = 0; j < kQueries; ++j) best[j] = products[j] > best[j] ? products[j] : best[j];
  }
  for (const float value : best) {
    score = a.sum ? score + value : (value > score ? value : score);
  }
  return score;
}

template <class T>
float score_page(const PageScoreArgs& a, const PageBounds<T>& page) {
  float score = a.sum ? 0.0f : -__builtin_inff();
  int64_t query = 0;
  for (; query + kScoreQueries <= a.queries; query += kScoreQueries) {
    score = join_score<kScoreQueries>(a, query, page, score);
  }
  for (; query < a.queries; ++query) score = join_score<1>(a, query, page, score);
  return score;
}

template <class T>
void score_pages(const PageScoreArgs& a, int64_t begin, int64_t end) {
  const PagesOfRow row(*a.pages, KVPart::keys, a.row);
  const int64_t d = row.s.d;
  const int64_t held = row.s.committed[a.row];
  float lowest[kMaxKVChannels], highest[kMaxKVChannels];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * row.p.page_size;
    const int64_t chunks = div_up(min_of(row.p.page_size, held - first), kBoundTokens);
    const int64_t at = row.slot(first) / kBoundTokens * d;
    const PageBounds<T> page{static_cast<const T*>(row.p.key_min) + at,
                             static_cast<const T*>(row.p.key_max) + at, chunks};
    if (a.chunks) {
      a.scores[i] = score_page(a, page);
    } else {
      widen_bounds(page.low, page.high, chunks, d, lowest, highest);
      a.scores[i] = score_page(a, PageBounds<float>{lowest, highest, 1});
    }
  }
}

void score_any(const PageScoreArgs& a, int64_t begin, int64_t end) {
  switch (a.pages->type) {
    case FloatType::f32: return score_pages<float>(a, begin, end);
    case FloatType::bf16: return score_pages<bf16>(a, begin, end);
    case FloatType::f16: return score_pages<f16>(a, begin, end);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
