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
// and gives y = 0, lse = -infinity where no part has a key. Weights are 0 below e^-88; factors stop
// falling at e^-87.3, 1e-38.
#pragma once

#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Rows that share the loads of a key or value.
constexpr int kRowBlock = 4;

constexpr float kMinusInfinity = -__builtin_inff();

// Rows that will be read soon, fetched into the cache one by one while others are computed with:
// left to the hardware, whose streams end with every page of 4 KiB, arithmetic and memory take
// turns.
class Ahead {
 public:
  Ahead() = default;
  template <class T>
  Ahead(const T* rows, int64_t stride, int64_t d)
      : rows_(reinterpret_cast<const char*>(rows)),
        stride_(stride * int64_t(sizeof(T))),
        end_(d * int64_t(sizeof(T))) {}

  void fetch(int64_t row) const {
    for (int64_t i = begin_; i < end_; i += 64) {
      __builtin_prefetch(rows_ + row * stride_ + i, 0, 2);
    }
  }
  // Parts [i, i + n) of `of` of every row: passes over the same rows share them, since lines that
  // arrive and lines that are asked for take the same buffers.
  Ahead part(int64_t i, int64_t n, int64_t of) const {
    const int64_t lines = div_up(end_ - begin_, 64);
    Ahead result = *this;
    result.begin_ = begin_ + lines * i / of * 64;
    if (i + n < of) result.end_ = begin_ + lines * (i + n) / of * 64;
    return result;
  }

 private:
  const char* rows_ = nullptr;
  int64_t stride_ = 0;
  int64_t begin_ = 0;  // bytes of a row
  int64_t end_ = 0;
};

template <int kN>
struct RowCount {
  static constexpr int kRows = kN;
};

// Keys, and then values, that all rows are taken through before the next: they stay in the first
// cache, and meanwhile the next come from memory, at 4 to 16 KiB ahead (measured: from 4 on memory
// is kept busy).
constexpr int64_t kKeyBlock = 32;

template <class T>
OW_INLINE VecF load_up_to(const T* p, int64_t lanes) {
  return lanes >= kLanes ? load(p) : load_n(p, lanes);
}

// A vector of factors: one element a lane, or two where the tier sums products of bf16 in pairs.
template <class T>
OW_INLINE VecF load_factors(const T* p) {
  return load(p);
}
template <class T>
OW_INLINE VecF load_factors_n(const T* p, int64_t n) {
  return load_n(p, n);
}
template <class T>
constexpr int64_t factors_of(const T*) {
  return kLanes;
}

// Scores of kKeys keys. Their dot products are as many vectors, which are summed together: one by
// one, that takes longer than the products of 64 dimensions.
template <int kRows, int kKeys, class T>
OW_INLINE void score_block(const T* const* q, const T* keys, int64_t stride, int64_t d, float scale,
                           float* const* scores) {
  constexpr int kLaneCount = int(kLanes);
  constexpr int kSums = (kRows * kKeys + kLaneCount - 1) / kLaneCount * kLaneCount;
  constexpr int64_t kStep = factors_of(static_cast<const T*>(nullptr));
  VecF acc[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) acc[i] = set1(0.0f);
  const auto add_products = [&](int64_t i, auto load_at) __attribute__((always_inline)) {
    decltype(load_at(keys)) k[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) k[j] = load_at(keys + j * stride + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto row = load_at(q[r] + i);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) acc[r * kKeys + j] = fma(row, k[j], acc[r * kKeys + j]);
    }
  };
  int64_t i = 0;
  for (; i + kStep <= d; i += kStep) {
    add_products(i, [](const T* p) { return load_factors(p); });
  }
  if (i < d) {
    add_products(i, [n = d - i](const T* p) { return load_factors_n(p, n); });
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

template <int kRows, class T, class Fetch>
OW_INLINE void score_keys(const T* const* q, const T* keys, int64_t stride, int64_t count,
                          int64_t d, float scale, float* const* scores, const Fetch& ahead) {
  // A power of two, so that blocks of keys leave no rest.
  constexpr int kKeys = kLanes > kRows ? int(kLanes) / (kRows == 3 ? 4 : kRows) : 1;
  float* to[kRows];
  const auto block = [&](int64_t j, auto size) __attribute__((always_inline)) {
    for (int r = 0; r < kRows; ++r) to[r] = scores[r] + j;
    score_block<kRows, decltype(size)::kRows>(q, keys + j * stride, stride, d, scale, to);
    for (int i = 0; i < size.kRows; ++i) ahead.fetch(j + i);
  };
  const int64_t whole = count / kKeys * kKeys;
  for (int64_t j = 0; j < whole; j += kKeys) block(j, RowCount<kKeys>{});
  for (int64_t j = whole; j < count; ++j) block(j, RowCount<1>{});
}

// Brings a state (o, m, l) to a larger m.
OW_INLINE void raise(float* state, int64_t dv, float largest) {
  float& m = state[dv];
  float& l = state[dv + 1];
  if (largest > m && m != kMinusInfinity) {
    const VecF factor = exp_(set1(m - largest));
    for (int64_t i = 0; i < dv; i += kLanes) {
      const int64_t some = min_of(kLanes, dv - i);
      store_n(state + i, mul(load_n(state + i, some), factor), some);
    }
    store_n(&l, mul(set1(l), factor), 1);
  }
  m = largest;
}

// Turns scores of kRows rows into weights, in place, and brings the rows' states (o, m, l) to their
// largest score: o still lacks the values of these keys. A score that is not finite makes l NaN.
template <int kRows>
OW_INLINE void soften(float* const* scores, int64_t count, int64_t dv, float* const* states) {
  const int64_t whole = count / kLanes * kLanes;
  VecF most[kRows];
  VecI bits = set1(int32_t{0});
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) most[r] = set1(states[r][dv]);
  for (int64_t j = 0; j < whole; j += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const VecF score = load(scores[r] + j);
      most[r] = max_(score, most[r]);
      bits = max_(bits, abs_bits(score));
    }
  }
  // Of all rows before the weights of any: the steps to the largest wait for each other.
  float largest[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    largest[r] = max_of_lanes(most[r]);
    if (whole < count) {
      const VecF score = load_n(scores[r] + whole, count - whole);
      bits = max_(bits, abs_bits(score));
      for (int64_t j = whole; j < count; ++j) {
        largest[r] = scores[r][j] > largest[r] ? scores[r][j] : largest[r];
      }
    }
  }
  const bool finite = uint32_t(max_of_lanes(bits)) < 0x7f800000;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const VecF m = set1(largest[r]);
    raise(states[r], dv, largest[r]);
    VecF total = set1(0.0f);
    if (!finite) {
      for (int64_t j = 0; j < count; ++j) total = add(total, set1(scores[r][j] * 0.0f));
    }
    const auto weigh = [&](VecF score) __attribute__((always_inline)) {
      return exp2_(mul(sub(score, m), set1(1.44269504f)));
    };
    int64_t j = 0;
    for (; j < whole; j += kLanes) {
      const VecF weight = weigh(load(scores[r] + j));
      store(scores[r] + j, weight);
      total = add(total, weight);
    }
    if (j < count) {
      // Read back for its zeros past the end.
      store_n(scores[r] + j, weigh(load_n(scores[r] + j, count - j)), count - j);
      total = add(total, load_n(scores[r] + j, count - j));
    }
    states[r][dv + 1] += sum(total);
  }
}
OW_INLINE void soften(float* scores, int64_t count, int64_t dv, float* state) {
  soften<1>(&scores, count, dv, &state);
}

OW_INLINE void clear_states(float* states, int64_t stride, int64_t rows, int64_t dv) {
  for (int64_t r = 0; r < rows; ++r, states += stride) {
    memset(states, 0, size_t(dv + 2) * sizeof(float));
    states[dv] = kMinusInfinity;
  }
}

// Two vectors of consecutive elements, in the order that suits their type.
template <class T>
OW_INLINE void load_pair(const T* p, VecF (&pair)[2]) {
  pair[0] = load(p);
  pair[1] = load(p + kLanes);
}
template <class T>
OW_INLINE void to_pair_order(const T*, VecF (&)[2]) {}
template <class T>
OW_INLINE void from_pair_order(const T*, VecF (&)[2]) {}

// out[r][i] += sum_j weights[r][j] * value_j[i] for rows [first, first + kRows) and i in
// [begin, begin + 2 * kPairs * kLanes)
template <int kRows, int kPairs, class T, class Fetch>
OW_INLINE void sum_pairs(const float* const* weights, int first, const T* values, int64_t stride,
                         int64_t count, int64_t begin, float* const* out, const Fetch& ahead) {
  VecF acc[kRows][kPairs][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      const float* from = out[first + r] + begin + 2 * v * kLanes;
      acc[r][v][0] = load(from);
      acc[r][v][1] = load(from + kLanes);
      to_pair_order(values, acc[r][v]);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* value = values + j * stride + begin;
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      VecF pair[2];
      load_pair(value + 2 * v * kLanes, pair);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const VecF weight = set1(weights[first + r][j]);
        acc[r][v][0] = fma(weight, pair[0], acc[r][v][0]);
        acc[r][v][1] = fma(weight, pair[1], acc[r][v][1]);
      }
    }
    ahead.fetch(j);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      float* to = out[first + r] + begin + 2 * v * kLanes;
      from_pair_order(values, acc[r][v]);
      store(to, acc[r][v][0]);
      store(to + kLanes, acc[r][v][1]);
    }
  }
}

// The same for i in [begin, begin + lanes), at most a vector.
template <int kRows, class T, class Fetch>
OW_INLINE void sum_lanes(const float* const* weights, const T* values, int64_t stride,
                         int64_t count, int64_t begin, int64_t lanes, float* const* out,
                         const Fetch& ahead) {
  VecF acc[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) acc[r] = load_n(out[r] + begin, lanes);
  for (int64_t j = 0; j < count; ++j) {
    const VecF value = load_up_to(values + j * stride + begin, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) acc[r] = fma(set1(weights[r][j]), value, acc[r]);
    ahead.fetch(j);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store_n(out[r] + begin, acc[r], lanes);
}

// out[r][i] += sum_j weights[r][j] * value_j[i]. Sixteen accumulators, half of the registers of
// AVX-512: of eight vectors and two rows where values are that long, so that memory is read in
// order, or of four and four. (AVX2 spills some.)
template <int kRows, class T, class Fetch>
OW_INLINE void sum_values(const float* const* weights, const T* values, int64_t stride,
                          int64_t count, int64_t d, float* const* out, const Fetch& ahead) {
  int64_t i = 0;
  const auto fetched = [&](auto part) { return i == 0 ? part : decltype(part){}; };
  if constexpr (kLanes == 16) {
    constexpr int kHalf = kRows > 2 ? 2 : kRows;
    for (; i + 8 * kLanes <= d; i += 8 * kLanes) {
      sum_pairs<kHalf, 4>(weights, 0, values, stride, count, i, out,
                          fetched(ahead.part(0, kHalf, kRows)));
      if constexpr (kRows > kHalf) {
        sum_pairs<kRows - kHalf, 4>(weights, kHalf, values, stride, count, i, out,
                                    fetched(ahead.part(kHalf, kRows - kHalf, kRows)));
      }
    }
  }
  for (; i + 4 * kLanes <= d; i += 4 * kLanes) {
    sum_pairs<kRows, 2>(weights, 0, values, stride, count, i, out, fetched(ahead));
  }
  if (i + 2 * kLanes <= d) {
    sum_pairs<kRows, 1>(weights, 0, values, stride, count, i, out, fetched(ahead));
    i += 2 * kLanes;
  }
  for (; i < d; i += kLanes) {
    const int64_t lanes = min_of(kLanes, d - i);
    sum_lanes<kRows>(weights, values, stride, count, i, lanes, out, fetched(ahead));
  }
}

// Calls body(RowCount<rows>) for 1 to kRowBlock rows.
template <class Body>
OW_INLINE void with_row_count(int64_t rows, const Body& body) {
  switch (rows) {
    case 1: return body(RowCount<1>{});
    case 2: return body(RowCount<2>{});
    case 3: return body(RowCount<3>{});
    case 4: return body(RowCount<4>{});
  }
}
// Calls body(first row, RowCount<size>) over blocks of kRowBlock rows, and what is left of them.
template <class Body>
OW_INLINE void for_each_row_block(int64_t rows, const Body& body) {
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    with_row_count(min_of(kRowBlock, rows - r),
                   [&](auto count) __attribute__((always_inline)) { body(r, count); });
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
