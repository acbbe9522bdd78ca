// Rows of floats to codes, scales and mins. kv_cache.h has the formulas.
#pragma once

#include "kernels/kv_cache/kv_cache_codes_body.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

template <class T>
OW_INLINE VecF load_up_to(const T* p, int64_t lanes) {
  return lanes == kLanes ? load(p) : load_n(p, lanes);
}
template <class T>
OW_INLINE void store_up_to(T* p, VecF value, int64_t lanes) {
  if (lanes == kLanes) {
    store(p, value);
  } else {
    store_n(p, value, lanes);
  }
}
// By the order of max_, so that every tier treats a NaN alike.
OW_INLINE VecF smaller(VecF a, VecF b) {
  const VecF zero = set1(0.0f);
  return sub(zero, max_(sub(zero, a), sub(zero, b)));
}

constexpr uint32_t kInfinity = 0x7f800000;
constexpr float kNaN = __builtin_nanf("");

// The next number of the type towards +infinity, or towards -infinity.
OW_INLINE uint32_t step_bits(uint32_t bits, uint32_t sign_bit, bool up) {
  if ((bits & ~sign_bit) == 0) return up ? 1 : sign_bit | 1;
  return ((bits & sign_bit) == 0) == up ? bits + 1 : bits - 1;
}
OW_INLINE float stepped(float value, bool) { return value; }
OW_INLINE bf16 stepped(bf16 value, bool up) {
  return {uint16_t(step_bits(value.bits, 0x8000, up))};
}
OW_INLINE f16 stepped(f16 value, bool up) { return {uint16_t(step_bits(value.bits, 0x8000, up))}; }

// The nearest T that is not below (up), or not above.
template <class T>
OW_INLINE T rounded(float value, bool up) {
  T nearest;
  from_float(value, &nearest);
  const float back = ow::to_float(nearest);
  return (up ? back < value : back > value) ? stepped(nearest, up) : nearest;
}

// Smallest and largest of a group, and its largest magnitude as bits: integer comparison orders NaN
// above infinity above all else. Starts as that of a group whose every number is an outlier.
struct Range {
  float low = 0.0f, high = 0.0f;
  uint32_t magnitude = 0;
};

// Writes scale and min of the group, and gives them as they are stored.
struct Grid {
  float scale, min;
};
template <class T>
OW_INLINE Grid store_grid(const Range& range, float steps, T* scale, T* min) {
  const T step = rounded<T>((range.high - range.low) / steps, true);
  // Not -0: tiers find it in groups of other sizes.
  from_float(range.low + 0.0f, min);
  if (range.magnitude >= kInfinity ||
      (float_to_bits(ow::to_float(step)) & kInfinity) == kInfinity) {
    from_float(0.0f, scale);
    from_float(kNaN, min);
  } else {
    *scale = step;
  }
  return {ow::to_float(*scale), ow::to_float(*min)};
}

// Which channels of each token are stored as they are.
struct Outliers {
  int64_t count;  // of a token
  uint8_t flags[kMaxKVGroup * kMaxOutlierChannels];

  bool at(int64_t token, int64_t channel) const {
    return count > 0 && flags[token * kMaxOutlierChannels + channel] != 0;
  }
};

// Of one token, by distance from the means of its channels' groups.
template <class T>
void choose_outliers(const T* x, int64_t d, const float* means, int64_t count, uint8_t* flags) {
  float distance[kMaxOutlierChannels];
  for (int64_t c = 0; c < d; ++c) {
    distance[c] = __builtin_fabsf(ow::to_float(x[c]) - means[c]);
    flags[c] = 0;
  }
  for (int64_t i = 0; i < count; ++i) {
    int64_t best = 0;
    for (int64_t c = 0; c < d; ++c) {
      if (flags[best] != 0 || (flags[c] == 0 && distance[c] > distance[best])) best = c;
    }
    flags[best] = 1;
  }
}

template <class T>
void store_outliers(const PagesOfRow& row, int64_t token, const T* x, const uint8_t* flags) {
  const int64_t at = row.slot(token) * row.s.outliers;
  uint8_t* index = row.s.outlier_index + at;
  T* values = static_cast<T*>(row.s.outlier_values) + at;
  for (int64_t c = 0; c < row.s.d; ++c) {
    if (flags[c] == 0) continue;
    *index++ = uint8_t(c);
    *values++ = x[c];
  }
}

// Codes of channels [begin, end) of a token. Where they differ by channel, scales (1 where they are
// 0) and mins are read from channel `begin` on; else one of each is given.
struct Encoder {
  const KVSide& s;
  float top;              // largest code of a grid without table
  float thresholds[255];  // between the entries of the table
  int64_t count;

  explicit Encoder(const KVSide& side)
      : s(side),
        top(float((1 << side.bits) - 1)),
        count(side.table == nullptr ? 0 : (1 << side.bits) - 1) {
    for (int64_t i = 0; i < count; ++i) thresholds[i] = 0.5f * (s.table[i] + s.table[i + 1]);
  }
  float steps() const { return s.table == nullptr ? top : 1.0f; }

  void store_codes(VecF unit, int64_t lanes, uint8_t* codes) const {
    // As the first argument of max_, a NaN becomes 0.
    const VecF clamped = smaller(max_(unit, set1(0.0f)), set1(top));
    if (s.table == nullptr) {
      int8_t* out = reinterpret_cast<int8_t*>(codes);
      if (lanes == kLanes) {
        store_i8(out, to_int(clamped));
      } else {
        store_i8_n(out, to_int(clamped), lanes);
      }
      return;
    }
    float value[kLanes];
    store(value, clamped);
    for (int64_t i = 0; i < lanes; ++i) {
      int code = 0;
      for (int64_t j = 0; j < count; ++j) code += value[i] > thresholds[j];
      codes[i] = uint8_t(code);
    }
  }
};

OW_INLINE float divisor(float scale) { return scale > 0.0f ? scale : 1.0f; }

template <class T>
Range channel_range(const T* x, int64_t stride, int64_t tokens, const Outliers& outliers,
                    int64_t channel) {
  Range range;
  bool first = true;
  for (int64_t t = 0; t < tokens; ++t) {
    if (outliers.at(t, channel)) continue;
    const float value = ow::to_float(x[t * stride + channel]);
    const uint32_t bits = float_to_bits(value) & 0x7fffffff;
    range.magnitude = range.magnitude > bits ? range.magnitude : bits;
    range.low = first || value < range.low ? value : range.low;
    range.high = first || value > range.high ? value : range.high;
    first = false;
  }
  return range;
}

// group_size tokens from `first` on, with a scale for each channel.
template <class T>
void write_channel_group(const PagesOfRow& row, const Encoder& encoder, int64_t first, const T* x,
                         int64_t stride, Outliers* outliers) {
  const KVSide& s = row.s;
  const int64_t tokens = s.group_size;
  T* scales = static_cast<T*>(s.scales) + row.scale_at(first, 0);
  T* mins = static_cast<T*>(s.mins) + row.scale_at(first, 0);
  float divisors[kMaxKVChannels], lows[kMaxKVChannels];
  if (outliers->count > 0) {
    float means[kMaxOutlierChannels];
    for (int64_t c = 0; c < s.d; ++c) {
      double total = 0.0;
      for (int64_t t = 0; t < tokens; ++t) total += double(ow::to_float(x[t * stride + c]));
      means[c] = float(total / double(tokens));
    }
    for (int64_t t = 0; t < tokens; ++t) {
      uint8_t* flags = outliers->flags + t * kMaxOutlierChannels;
      choose_outliers(x + t * stride, s.d, means, outliers->count, flags);
      store_outliers(row, first + t, x + t * stride, flags);
    }
  }
  for (int64_t c = 0; c < s.d; c += kLanes) {
    const int64_t lanes = min_of(kLanes, s.d - c);
    float low[kLanes], high[kLanes], magnitude[kLanes];
    VecF lowest = load_up_to(x + c, lanes);
    VecF highest = lowest;
    VecI largest = set1(int32_t{0});
    for (int64_t t = 0; t < tokens; ++t) {
      const VecF value = load_up_to(x + t * stride + c, lanes);
      lowest = smaller(lowest, value);
      highest = max_(highest, value);
      largest = max_(largest, abs_bits(value));
    }
    store(low, lowest);
    store(high, highest);
    store(magnitude, as_float(largest));
    for (int64_t i = 0; i < lanes; ++i) {
      const Range range = outliers->count == 0 ? Range{low[i], high[i], float_to_bits(magnitude[i])}
                                               : channel_range(x, stride, tokens, *outliers, c + i);
      const Grid grid = store_grid(range, encoder.steps(), scales + c + i, mins + c + i);
      divisors[c + i] = divisor(grid.scale);
      lows[c + i] = grid.min;
    }
  }
  uint8_t codes[kCodeRow] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < s.d; c += kLanes) {
      const int64_t lanes = min_of(kLanes, s.d - c);
      const VecF above = sub(load_up_to(x + t * stride + c, lanes), load_up_to(lows + c, lanes));
      encoder.store_codes(div_(above, load_up_to(divisors + c, lanes)), lanes, codes + c);
    }
    for (int64_t c = 0; outliers->count > 0 && c < s.d; ++c) {
      if (outliers->at(t, c)) codes[c] = 0;
    }
    row.put_codes(first + t, codes);
  }
}

// Of n numbers, without the outliers.
template <class T>
Range token_range(const T* x, int64_t n, const uint8_t* flags) {
  Range range;
  if (flags != nullptr || n < kLanes) {
    bool first = true;
    for (int64_t i = 0; i < n; ++i) {
      if (flags != nullptr && flags[i] != 0) continue;
      const float value = ow::to_float(x[i]);
      const uint32_t bits = float_to_bits(value) & 0x7fffffff;
      range.magnitude = range.magnitude > bits ? range.magnitude : bits;
      range.low = first || value < range.low ? value : range.low;
      range.high = first || value > range.high ? value : range.high;
      first = false;
    }
    return range;
  }
  // The last vector ends with the group and may overlap the one before it.
  VecF lowest = load(x + n - kLanes);
  VecF highest = lowest;
  VecI largest = abs_bits(lowest);
  for (int64_t i = 0; i + kLanes < n; i += kLanes) {
    const VecF value = load(x + i);
    lowest = smaller(lowest, value);
    highest = max_(highest, value);
    largest = max_(largest, abs_bits(value));
  }
  range.low = -max_of_lanes(sub(set1(0.0f), lowest));
  range.high = max_of_lanes(highest);
  range.magnitude = uint32_t(max_of_lanes(largest));
  return range;
}

template <class T>
void write_token(const PagesOfRow& row, const Encoder& encoder, int64_t token, const T* x) {
  const KVSide& s = row.s;
  uint8_t flags[kMaxOutlierChannels];
  if (s.outliers > 0) {
    float means[kMaxOutlierChannels];
    for (int64_t begin = 0; begin < s.d; begin += s.group_size) {
      const int64_t end = min_of(begin + s.group_size, s.d);
      double total = 0.0;
      for (int64_t c = begin; c < end; ++c) total += double(ow::to_float(x[c]));
      for (int64_t c = begin; c < end; ++c) means[c] = float(total / double(end - begin));
    }
    choose_outliers(x, s.d, means, s.outliers, flags);
    store_outliers(row, token, x, flags);
  }
  uint8_t codes[kCodeRow] = {};
  for (int64_t begin = 0; begin < s.d; begin += s.group_size) {
    const int64_t n = min_of(s.group_size, s.d - begin);
    const int64_t at = row.scale_at(token, begin);
    const Range range = token_range(x + begin, n, s.outliers > 0 ? flags + begin : nullptr);
    const Grid grid = store_grid(range, encoder.steps(), static_cast<T*>(s.scales) + at,
                                 static_cast<T*>(s.mins) + at);
    const VecF low = set1(grid.min);
    const VecF step = set1(divisor(grid.scale));
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t lanes = min_of(kLanes, n - i);
      const VecF above = sub(load_up_to(x + begin + i, lanes), low);
      encoder.store_codes(div_(above, step), lanes, codes + begin + i);
    }
  }
  for (int64_t c = 0; s.outliers > 0 && c < s.d; ++c) {
    if (flags[c] != 0) codes[c] = 0;
  }
  row.put_codes(token, codes);
}

template <class T>
void write_tokens(const KVPages& p, KVPart part, int64_t r, int64_t first, int64_t count,
                  const T* x, int64_t stride) {
  const PagesOfRow row(p, part, r);
  const KVSide& s = row.s;
  if (is_dense(s)) {
    for (int64_t t = 0; t < count; ++t) {
      memcpy(static_cast<T*>(s.rows) + row.slot(first + t) * s.d, x + t * stride,
             size_t(s.d) * sizeof(T));
    }
    return;
  }
  const Encoder encoder(s);
  if (s.axis == KVAxis::token) {
    for (int64_t t = 0; t < count; ++t) write_token(row, encoder, first + t, x + t * stride);
    return;
  }
  Outliers outliers;
  outliers.count = s.outliers;
  for (int64_t t = 0; t < count; t += s.group_size) {
    write_channel_group(row, encoder, first + t, x + t * stride, stride, &outliers);
  }
}

void write_any(const KVPages& p, KVPart part, int64_t row, int64_t first, int64_t count,
               const void* x, int64_t stride) {
  switch (p.type) {
    case FloatType::f32:
      return write_tokens(p, part, row, first, count, static_cast<const float*>(x), stride);
    case FloatType::bf16:
      return write_tokens(p, part, row, first, count, static_cast<const bf16*>(x), stride);
    case FloatType::f16:
      return write_tokens(p, part, row, first, count, static_cast<const f16*>(x), stride);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
