// Attention of a few query rows over some keys, in terms of simd/vec.h:
//
//   score_keys    s[r,j] = scale * q_r . key_j
//   soften        w[r,j] = e^(s[r,j] - m_r), m_r the largest s[r,j] so far; l_r += sum_j w[r,j]
//   sum_values    o[r,i] += sum_j w[r,j] value_j[i]
//   merge_states  the result over all keys, from the states of its parts
//
// The state of a row over the keys so far is (o, m, l), in memory o[dv], m, l; when m grows, o and
// l shrink by e^(old m - m). Without a key m is -infinity. Merging weighs each part by e^(m -
// largest m):
//
//   y = sum_c f_c o_c / sum_c f_c l_c      lse = largest m + log sum_c f_c l_c
//
// and gives y = 0, lse = -infinity where no part has a key. e^(s - m) stops falling at e^-87.3,
// 1e-38.
#pragma once

#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Rows that share the loads of a key or value, and vectors of dimensions whose sums of values one
// pass over the values makes: 16 accumulators, half of the registers of AVX-512. (AVX2 spills
// some.)
constexpr int kRowBlock = 4;
constexpr int kVectors = 4;

constexpr float kMinusInfinity = -__builtin_inff();

// What will be read next, fetched into the cache row by row while other rows are computed with:
// left to the hardware, arithmetic and memory take turns (measured: their times add up).
struct Ahead {
  const void* rows = nullptr;
  int64_t stride = 0;  // in bytes
  int64_t bytes = 0;   // of a row

  template <class T>
  static Ahead of(const T* rows, int64_t stride, int64_t d) {
    return {rows, stride * int64_t(sizeof(T)), d * int64_t(sizeof(T))};
  }
  void fetch(int64_t row) const {
    const char* p = static_cast<const char*>(rows) + row * stride;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
};

template <class T>
OW_INLINE VecF load_up_to(const T* p, int64_t lanes) {
  return lanes >= kLanes ? load(p) : load_n(p, lanes);
}

// Scores of kKeys keys. Their dot products are as many vectors, which are summed together: one by
// one, that takes longer than the products of 64 dimensions.
template <int kRows, int kKeys, class Q, class T>
OW_INLINE void score_block(const Q* const* q, const T* keys, int64_t stride, int64_t d, float scale,
                           float* const* scores) {
  constexpr int kLaneCount = int(kLanes);
  constexpr int kSums = (kRows * kKeys + kLaneCount - 1) / kLaneCount * kLaneCount;
  VecF acc[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) acc[i] = set1(0.0f);
  const auto add_products = [&](int64_t i, auto load_at) __attribute__((always_inline)) {
    VecF k[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) k[j] = load_at(keys + j * stride + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const VecF row = load_at(q[r] + i);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) acc[r * kKeys + j] = fma(row, k[j], acc[r * kKeys + j]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    add_products(i, [](const auto* p) { return load(p); });
  }
  if (i < d) {
    add_products(i, [lanes = d - i](const auto* p) { return load_n(p, lanes); });
  }
  float sums[kSums];
#pragma GCC unroll 4
  for (int begin = 0; begin < kSums; begin += kLaneCount) {
    VecF part[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLaneCount; ++l) part[l] = acc[begin + l];
    store(sums + begin, mul(sums_of(part), set1(scale)));
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) memcpy(scores[r], sums + r * kKeys, kKeys * sizeof(float));
}

template <int kRows, class Q, class T>
OW_INLINE void score_keys(const Q* const* q, const T* keys, int64_t stride, int64_t count,
                          int64_t d, float scale, float* const* scores, const Ahead& ahead) {
  constexpr int kKeys = kLanes > kRows ? int(kLanes) / kRows : 1;
  float* to[kRows];
  const auto block = [&](int64_t j, auto score) __attribute__((always_inline)) {
    for (int r = 0; r < kRows; ++r) to[r] = scores[r] + j;
    score(keys + j * stride);
    for (int i = 0; i < kKeys; ++i) ahead.fetch(j + i);
  };
  int64_t j = 0;
  for (; j + kKeys <= count; j += kKeys) {
    block(j, [&](const T* key) { score_block<kRows, kKeys>(q, key, stride, d, scale, to); });
  }
  for (; kKeys > 1 && j < count; ++j) {
    block(j, [&](const T* key) { score_block<kRows, 1>(q, key, stride, d, scale, to); });
  }
}

// Turns scores into weights, in place, and brings the row's state (o, m, l) to their largest score:
// o still lacks the values of these keys.
OW_INLINE void soften(float* scores, int64_t count, int64_t dv, float* state) {
  float& m = state[dv];
  float& l = state[dv + 1];
  VecF most = set1(m);
  for (int64_t j = 0; j + kLanes <= count; j += kLanes) most = max_(load(scores + j), most);
  float largest = max_of_lanes(most);
  for (int64_t j = count / kLanes * kLanes; j < count; ++j) {
    largest = scores[j] > largest ? scores[j] : largest;
  }
  if (largest > m && m != kMinusInfinity) {
    const VecF factor = exp_(set1(m - largest));
    for (int64_t i = 0; i < dv; i += kLanes) {
      const int64_t some = min_of(kLanes, dv - i);
      store_n(state + i, mul(load_n(state + i, some), factor), some);
    }
    store_n(&l, mul(set1(l), factor), 1);
  }
  m = largest;
  VecF total = set1(0.0f);
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t some = min_of(kLanes, count - j);
    const VecF score = load_n(scores + j, some);
    const VecF weight = exp_(sub(score, set1(largest)));
    // exp_ has no NaN to give; a score that is not finite minus itself is one.
    store_n(scores + j, add(weight, sub(score, score)), some);
    total = add(total, load_n(scores + j, some));
  }
  l += sum(total);
}

OW_INLINE void clear_states(float* states, int64_t rows, int64_t dv) {
  for (int64_t r = 0; r < rows; ++r, states += dv + 2) {
    memset(states, 0, size_t(dv + 2) * sizeof(float));
    states[dv] = kMinusInfinity;
  }
}

// out[r][i] += sum_j weights[r][j] * value_j[i]
template <int kRows, class T>
OW_INLINE void sum_values(const float* const* weights, const T* values, int64_t stride,
                          int64_t count, int64_t d, float* const* out, const Ahead& ahead) {
  for (int64_t begin = 0; begin < d; begin += kVectors * kLanes) {
    const Ahead next = begin == 0 ? ahead : Ahead{};
    const int64_t size = min_of(kVectors * kLanes, d - begin);
    VecF acc[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t lanes = size - v * kLanes;
        acc[r][v] = lanes > 0 ? load_n(out[r] + begin + v * kLanes, lanes) : set1(0.0f);
      }
    }
    const auto add_value = [&](int64_t j, auto load_at) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const VecF value = load_at(values + j * stride + begin + v * kLanes, v);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(set1(weights[r][j]), value, acc[r][v]);
      }
      next.fetch(j);
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

template <int kN>
struct RowCount {
  static constexpr int kRows = kN;
};
// Calls body(first row, RowCount<size>) over blocks of kRowBlock rows, and what is left of them.
template <class Body>
OW_INLINE void for_each_row_block(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kRowBlock <= rows; r += kRowBlock) body(r, RowCount<kRowBlock>{});
  switch (rows - r) {
    case 1: return body(r, RowCount<1>{});
    case 2: return body(r, RowCount<2>{});
    case 3: return body(r, RowCount<3>{});
  }
}

// Merges `count` states, `stride` floats apart, to y[d]; gives lse. Uses up the states.
template <class T>
float merge_states(float* states, int64_t stride, int64_t count, int64_t d, T* y) {
  float largest = kMinusInfinity;
  for (int64_t c = 0; c < count; ++c) {
    const float m = states[c * stride + d];
    largest = m > largest ? m : largest;
  }
  float total = 0.0f;
  bool seen = false;
  for (int64_t c = 0; c < count; ++c) {
    float* m = states + c * stride + d;
    // What the part counts, in the place of its m. Scores that were NaN leave m at -infinity, and
    // a sum that is not zero.
    const bool empty = *m == kMinusInfinity && m[1] == 0.0f;
    store_n(m, empty ? set1(0.0f) : exp_(set1(*m == largest ? 0.0f : *m - largest)), 1);
    total += empty ? 0.0f : *m * m[1];
    seen |= !empty;
  }
  const VecF divisor = set1(seen ? total : 1.0f);
  for (int64_t i = 0; i < d; i += kLanes) {
    const int64_t lanes = min_of(kLanes, d - i);
    VecF acc = set1(0.0f);
    for (int64_t c = 0; c < count; ++c) {
      const float* state = states + c * stride;
      acc = fma(set1(state[d]), load_n(state + i, lanes), acc);
    }
    store_n(y + i, div_(acc, divisor), lanes);
  }
  return seen ? largest + __builtin_logf(total) : kMinusInfinity;
}

}  // namespace
}  // namespace ow::OW_TARGET
