// Means and scores of blocks in terms of simd/vec.h; each block_scores_<tier>.cpp compiles it once.
#pragma once

#include "kernels/block_scores/block_scores.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Vectors of dimensions that one pass over a block's tokens sums.
constexpr int kMeanVectors = 4;

template <class T>
void mean_of_block(const T* x, int64_t tokens, int64_t stride, int64_t d, float* out) {
  const VecF share = set1(1.0f / float(tokens));
  int64_t i = 0;
  for (; i + kMeanVectors * kLanes <= d; i += kMeanVectors * kLanes) {
    VecF acc[kMeanVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kMeanVectors; ++v) acc[v] = set1(0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kMeanVectors; ++v) {
        acc[v] = add(acc[v], load(x + t * stride + i + v * kLanes));
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kMeanVectors; ++v) store(out + i + v * kLanes, mul(acc[v], share));
  }
  for (; i < d; i += kLanes) {
    const int64_t lanes = min_of(kLanes, d - i);
    VecF acc = set1(0.0f);
    for (int64_t t = 0; t < tokens; ++t) acc = add(acc, load_n(x + t * stride + i, lanes));
    store_n(out + i, mul(acc, share), lanes);
  }
}

template <class T>
void means(const BlockMeansArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % a.max_blocks * a.block;
    const int64_t head = unit / a.max_blocks % a.heads;
    const int64_t s = unit / a.max_blocks / a.heads;
    float* out = a.means + unit * a.d;
    const int64_t tokens = min_of(a.block, a.tokens.size(s) - first);
    if (tokens <= 0) {
      memset(out, 0, size_t(a.d) * sizeof(float));
      continue;
    }
    const T* x = static_cast<const T*>(a.x) + a.tokens.begin(s, a.stride_b, a.stride_token) +
                 first * a.stride_token + head * a.stride_head;
    mean_of_block(x, tokens, a.stride_token, a.d, out);
  }
}

// Keys as floats, side by side: each meets many rows of queries, of all heads of its group.
template <class T>
void sample(const HipSearchArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % a.max_blocks;
    const int64_t head = unit / a.max_blocks % a.kv_heads;
    const int64_t s = unit / a.max_blocks / a.kv_heads;
    const T* k = static_cast<const T*>(a.k_data) + a.keys.begin(s, a.k_stride_b, a.k_stride_token) +
                 head * a.k_stride_head;
    const int64_t last = min_of((block + 1) * a.block_n, a.keys.size(s));
    float* out = a.sampled + unit * sampled_keys(a) * a.d;
    for (int64_t j = block * a.block_n; j < last; j += a.key_stride, out += a.d) {
      for (int64_t i = 0; i < a.d; i += kLanes) {
        const int64_t lanes = min_of(kLanes, a.d - i);
        store_n(out + i, load_n(k + j * a.k_stride_token + i, lanes), lanes);
      }
    }
  }
}

template <class T>
void pack(const HipSearchArgs& a, const SearchRow& row) {
  const T* q = static_cast<const T*>(row.q);
  for (int64_t l = 0; l < row.lanes; ++l) {
    const T* query = q + min_of(l, row.queries - 1) * a.query_stride * a.q_stride_token;
    for (int64_t i = 0; i < a.d; ++i) row.packed[i * row.lanes + l] = ow::to_float(query[i]);
  }
}

// Keys whose products with one vector of queries are summed side by side: as many as hide the
// latency of fma. They may be of several blocks.
constexpr int kSearchKeys = 8;

OW_INLINE float largest_lane(VecF a) {
  alignas(64) float lanes[kLanes];
  store(lanes, a);
  float best = lanes[0];
  for (int64_t l = 1; l < kLanes; ++l) best = lanes[l] > best ? lanes[l] : best;
  return best;
}

// The products of 8 keys with a vector of queries.
OW_INLINE void multiply_keys(const float* const (&k)[kSearchKeys], const float* line,
                             int64_t stride, int64_t d, VecF (&acc)[kSearchKeys]) {
#pragma GCC unroll 8
  for (int u = 0; u < kSearchKeys; ++u) acc[u] = set1(0.0f);
  for (int64_t i = 0; i < d; ++i) {
    const VecF queries = load(line + i * stride);
#pragma GCC unroll 8
    for (int u = 0; u < kSearchKeys; ++u) acc[u] = fma(set1(k[u][i]), queries, acc[u]);
  }
}

void score(const HipSearchArgs& a, const SearchRow& row, const int32_t* blocks, int64_t count,
           float* scores) {
  const int64_t sampled = sampled_keys(a);
  const int64_t every = count * sampled;
  for (int64_t b = 0; b < count; ++b) scores[b] = -__builtin_inff();
  for (int64_t v = 0; v < row.lanes; v += kLanes) {
    VecF most = set1(-__builtin_inff());
    for (int64_t first = 0; first < every; first += kSearchKeys) {
      const float* k[kSearchKeys];
      for (int u = 0; u < kSearchKeys; ++u) {
        const int64_t e = min_of(first + u, every - 1);
        k[u] = row.k + (blocks[e / sampled] * sampled + e % sampled) * a.d;
      }
      VecF acc[kSearchKeys];
      multiply_keys(k, row.packed + v, row.lanes, a.d, acc);
      for (int u = 0; u < min_of(kSearchKeys, every - first); ++u) {
        most = max_(mul(acc[u], set1(a.sign)), most);
        const int64_t e = first + u;
        if (e % sampled != sampled - 1) continue;
        const float best = largest_lane(most);
        float* score = scores + e / sampled;
        *score = best > *score ? best : *score;
        most = set1(-__builtin_inff());
      }
    }
  }
}

#define OW_BY_TYPE(call_f32, call_bf16, call_f16) \
  switch (a.type) {                               \
    case FloatType::f32: return call_f32;         \
    case FloatType::bf16: return call_bf16;       \
    case FloatType::f16: return call_f16;         \
  }
void means_any(const BlockMeansArgs& a, int64_t begin, int64_t end) {
  OW_BY_TYPE(means<float>(a, begin, end), means<bf16>(a, begin, end), means<f16>(a, begin, end))
}
void sample_any(const HipSearchArgs& a, int64_t begin, int64_t end) {
  OW_BY_TYPE(sample<float>(a, begin, end), sample<bf16>(a, begin, end), sample<f16>(a, begin, end))
}
void pack_any(const HipSearchArgs& a, const SearchRow& row) {
  OW_BY_TYPE(pack<float>(a, row), pack<bf16>(a, row), pack<f16>(a, row))
}
#undef OW_BY_TYPE

}  // namespace
}  // namespace ow::OW_TARGET
