// Line scores in terms of simd/vec.h; each line_scores_<tier>.cpp compiles it once, with the
// product of its tier.
#pragma once

#include "kernels/line_scores/line_scores.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr int64_t kVectors = kProbePanel / kLanes;

// Queries of one panel: `rows` of them, lane 0 at position `first` and at q.
template <class T>
struct Panel {
  const T* q;
  const T* k;
  int64_t rows, first, d;
  int64_t q_stride, k_stride;
  float scale;
  float* packed;   // [d, 64] in the form of the product
  float* weights;  // [keys, 64]
  float* largest;  // [chunks, 64], which becomes the chunk's share
  float* sums;     // [chunks, 64]
  float* bands;

  int64_t keys() const { return first + rows; }  // that any of the queries sees
};

// q . k of `count` keys, into out [count, 64], by tiles of a product.
template <class Product, class T>
void multiply_keys(const Panel<T>& p, int64_t key, int64_t count, float* out) {
  constexpr int kKeys = Product::kKeys;
  int64_t j = 0;
  for (; j + kKeys <= count; j += kKeys) {
    Product::template tile<kKeys>(p, key + j, out + j * kProbePanel);
  }
  for (; j < count; ++j) Product::template tile<1>(p, key + j, out + j * kProbePanel);
}

// Products of floats, in fp32: packed is [d, 64] floats.
template <class T>
struct FloatProduct {
  static void pack(const Panel<T>& p) {
    for (int64_t i = 0; i < p.d; ++i) {
      for (int64_t l = 0; l < kProbePanel; ++l) {
        p.packed[i * kProbePanel + l] = l < p.rows ? ow::to_float(p.q[l * p.q_stride + i]) : 0.0f;
      }
    }
  }

  // 6 keys x 4 vectors are 24 sums, 4 lines and a broadcast, of 32 registers; with the 16 of AVX2
  // half as many vectors.
  static constexpr int kKeys = 6;
  static constexpr int kTileVectors = kLanes == 16 ? 4 : 2;

  template <int kCount>
  static void tile(const Panel<T>& p, int64_t key, float* out) {
    const T* k = p.k + key * p.k_stride;
    for (int64_t v = 0; v < kVectors; v += kTileVectors) {
      VecF acc[kCount][kTileVectors];
#pragma GCC unroll 6
      for (int j = 0; j < kCount; ++j) {
#pragma GCC unroll 4
        for (int u = 0; u < kTileVectors; ++u) acc[j][u] = set1(0.0f);
      }
      for (int64_t i = 0; i < p.d; ++i) {
        VecF line[kTileVectors];
#pragma GCC unroll 4
        for (int u = 0; u < kTileVectors; ++u) {
          line[u] = load(p.packed + i * kProbePanel + (v + u) * kLanes);
        }
#pragma GCC unroll 6
        for (int j = 0; j < kCount; ++j) {
          const VecF element = set1(ow::to_float(k[j * p.k_stride + i]));
#pragma GCC unroll 4
          for (int u = 0; u < kTileVectors; ++u) acc[j][u] = fma(element, line[u], acc[j][u]);
        }
      }
#pragma GCC unroll 6
      for (int j = 0; j < kCount; ++j) {
#pragma GCC unroll 4
        for (int u = 0; u < kTileVectors; ++u) {
          store(out + j * kProbePanel + (v + u) * kLanes, acc[j][u]);
        }
      }
    }
  }

  static void run(const Panel<T>& p, int64_t key, int64_t count, float* out) {
    multiply_keys<FloatProduct>(p, key, count, out);
  }
};

// Lanes whose query is before the key get `value`.
template <class T>
void mask_chunk(const Panel<T>& p, int64_t key, int64_t count, float value, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const int64_t before = key + j - p.first;
    for (int64_t l = 0; l < min_of(before, kProbePanel); ++l) out[j * kProbePanel + l] = value;
  }
}

// Products of a chunk to e^(scale * product - m), and m and their sum.
template <class T, class Product>
void weigh_chunk(const Panel<T>& p, int64_t chunk) {
  const int64_t key = chunk * kProbeChunk;
  const int64_t count = min_of(kProbeChunk, p.keys() - key);
  float* out = p.weights + key * kProbePanel;
  Product::run(p, key, count, out);
  const bool masked = key + count - 1 > p.first;
  if (masked) {  // scaled first: -inf times a negative scale is no mask
    for (int64_t i = 0; i < count * kProbePanel; i += kLanes) {
      store(out + i, mul(load(out + i), set1(p.scale)));
    }
    mask_chunk(p, key, count, kMinusInfinity, out);
  }
  const VecF scale = set1(masked ? 1.0f : p.scale);
  for (int64_t v = 0; v < kProbePanel; v += kLanes) {
    VecF m = set1(kMinusInfinity);
    for (int64_t j = 0; j < count; ++j) m = max_(m, mul(load(out + j * kProbePanel + v), scale));
    store(p.largest + chunk * kProbePanel + v, m);
    VecF l = set1(0.0f);
    for (int64_t j = 0; j < count; ++j) {
      float* at = out + j * kProbePanel + v;
      const VecF weight = exp_(sub(mul(load(at), scale), m));
      store(at, weight);
      l = add(l, weight);
    }
    store(p.sums + chunk * kProbePanel + v, l);
  }
  if (!masked) return;
  // exp_ ends at 1e-38, and a lane without a key had NaN.
  mask_chunk(p, key, count, 0.0f, out);
  for (int64_t v = 0; v < kProbePanel; v += kLanes) {
    VecF l = set1(0.0f);
    for (int64_t j = 0; j < count; ++j) l = add(l, load(out + j * kProbePanel + v));
    store(p.sums + chunk * kProbePanel + v, l);
  }
}

// What each chunk's weights are multiplied by: e^(m - largest m) over the sum of all.
template <class T>
void share_chunks(const Panel<T>& p, int64_t chunks) {
  for (int64_t v = 0; v < kProbePanel; v += kLanes) {
    VecF m = set1(kMinusInfinity);
    for (int64_t c = 0; c < chunks; ++c) m = max_(m, load(p.largest + c * kProbePanel + v));
    VecF total = set1(0.0f);
    for (int64_t c = 0; c < chunks; ++c) {
      float* at = p.largest + c * kProbePanel + v;
      const VecF share = exp_(sub(load(at), m));
      total = fma(share, load(p.sums + c * kProbePanel + v), total);
      store(at, share);
    }
    for (int64_t c = 0; c < chunks; ++c) {
      float* at = p.largest + c * kProbePanel + v;
      store(at, div_(load(at), total));
    }
  }
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t l = p.rows; l < kProbePanel; ++l) p.largest[c * kProbePanel + l] = 0.0f;
  }
}

// Adds weights to columns, and to the bands that diagonals are made of: band b holds the keys
// j = b (mod kLanes), so that its vectors coincide with one another's and, from key to key, no load
// waits for the store before it. Vector v of key kLanes t + b is at vector steps - t + v.
template <class T>
void add_lines(const Panel<T>& p, int64_t steps, int64_t band, float* columns) {
  for (int64_t j = 0; j < p.keys(); ++j) {
    const float* share = p.largest + j / kProbeChunk * kProbePanel;
    float* at = p.bands + j % kLanes * band + (steps - j / kLanes) * kLanes;
    VecF total = set1(0.0f);
#pragma GCC unroll 4
    for (int64_t v = 0; v < kProbePanel; v += kLanes) {
      const VecF weight = mul(load(p.weights + j * kProbePanel + v), load(share + v));
      store(at + v, add(load(at + v), weight));
      total = add(total, weight);
    }
    columns[j] += sum(total);
  }
}

// Lane l of vector n of band b is at distance first - b + kLanes (n - steps) + l.
template <class T>
void add_bands(const Panel<T>& p, int64_t steps, int64_t band, float* diagonals) {
  const int64_t keys = p.keys();
  for (int64_t t = 0; t < keys; t += kLanes) {
    const int64_t lanes = min_of(kLanes, keys - t);
    VecF total = load_n(diagonals + t, lanes);
    for (int64_t b = 0; b < kLanes; ++b) {
      total = add(total, load_n(p.bands + b * band + t - p.first + b + kLanes * steps, lanes));
    }
    store_n(diagonals + t, total, lanes);
  }
}

template <class T, class Product>
void score_unit(const LineScoresArgs& a, float* scratch, int64_t unit) {
  const int64_t s = unit / a.heads;
  const int64_t head = unit % a.heads;
  const int64_t sq = a.queries.size(s);
  const int64_t sk = a.keys.size(s);
  const int64_t probes = min_of(a.probes, min_of(sq, sk));
  float* columns = a.columns + unit * a.max_keys;
  float* diagonals = a.diagonals + unit * a.max_keys;
  memset(columns, 0, size_t(a.max_keys) * sizeof(float));
  memset(diagonals, 0, size_t(a.max_keys) * sizeof(float));
  const T* q = static_cast<const T*>(a.q) + a.queries.begin(s, a.q_strides.b, a.q_strides.token) +
               head * a.q_strides.head;
  const T* k = static_cast<const T*>(a.k) + a.keys.begin(s, a.k_strides.b, a.k_strides.token) +
               head / (a.heads / a.kv_heads) * a.k_strides.head;
  const ProbeScratch parts = probe_scratch(a);
  Panel<T> p{};
  p.k = k;
  p.d = a.d;
  p.q_stride = a.q_strides.token;
  p.k_stride = a.k_strides.token;
  p.scale = a.scale;
  p.packed = scratch;
  p.weights = p.packed + parts.panel;
  p.largest = p.weights + parts.weights;
  p.sums = p.largest + parts.chunks / 2;
  p.bands = p.largest + parts.chunks;
  for (int64_t begin = 0; begin < probes; begin += kProbePanel) {
    p.rows = min_of(kProbePanel, probes - begin);
    p.first = sk - probes + begin;
    p.q = q + (sq - probes + begin) * p.q_stride;
    Product::pack(p);
    const int64_t chunks = div_up(p.keys(), kProbeChunk);
    for (int64_t c = 0; c < chunks; ++c) weigh_chunk<T, Product>(p, c);
    share_chunks(p, chunks);
    const int64_t steps = div_up(p.keys(), kLanes);
    const int64_t band = (steps + 1) * kLanes + kProbePanel;
    memset(p.bands, 0, size_t(kLanes * band) * sizeof(float));
    add_lines(p, steps, band, columns);
    add_bands(p, steps, band, diagonals);
  }
}

template <class T, class Product>
void score_units(const LineScoresArgs& a, float* scratch, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) score_unit<T, Product>(a, scratch, unit);
}

OW_INLINE void score_any(const LineScoresArgs& a, float* scratch, int64_t begin, int64_t end) {
  switch (a.type) {
    case FloatType::f32: return score_units<float, FloatProduct<float>>(a, scratch, begin, end);
    case FloatType::bf16: return score_units<bf16, FloatProduct<bf16>>(a, scratch, begin, end);
    case FloatType::f16: return score_units<f16, FloatProduct<f16>>(a, scratch, begin, end);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
