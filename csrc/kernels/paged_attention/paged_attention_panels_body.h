// Keys and values of any format as panels of fp32: what every tier computes with unless it has
// kernels for a format's own bytes.
//
//   keys     [d][32 tokens], so that a score is a sum over rows, 8 or 16 tokens a vector
//   values   [32 tokens][kMaxPagedD]
#pragma once

#include "kernels/paged_attention/paged_attention_chunk_body.h"

namespace ow::OW_TARGET {
namespace {

struct KeyPanel {
  alignas(64) float at[kMaxPagedD][kPanelTokens];
};
struct ValuePanel {
  alignas(64) float at[kPanelTokens][kMaxPagedD];
};

template <class Body>
OW_INLINE auto with_type(FloatType type, const void* p, const Body& body) {
  switch (type) {
    case FloatType::f32: return body(static_cast<const float*>(p));
    case FloatType::bf16: return body(static_cast<const bf16*>(p));
    default: return body(static_cast<const f16*>(p));
  }
}
// Elements [begin, begin + count) of an array.
inline __attribute__((always_inline)) void read_floats(const void* p, FloatType type, int64_t begin,
                                                       int64_t count, float* out) {
  with_type(type, p, [&](const auto* from) {
    for (int64_t i = 0; i < count; i += kLanes) {
      store_n(out + i, load_n(from + begin + i, count - i), count - i);
    }
  });
}

// Codes of k .. k + 3 of the lanes from n on, as floats: what a code stands for before scale and
// min.
class Codes {
 public:
  Codes(const KVSide& side, const uint8_t* page, int64_t panel_bytes)
      : page_(page), bits_(side.bits), panel_bytes_(panel_bytes), table_(side.table) {}

  void read(int64_t n, int64_t k, VecF out[4]) const {
    const CodeLines place = kv_code_place(bits_, panel_bytes_, n, k);
    const int64_t lane = n % kKVHalf * 4;
    const VecI low = line(place.line + lane);
    const bool split = place.high_shift >= 0;
    const VecI high = split ? line(place.high_line + lane) : low;
    const VecI mask = set1(int32_t((1 << (split ? 2 : bits_)) - 1));
    for (int b = 0; b < 4; ++b) {
      VecI code = bit_and(shift_right(low, 8 * b + place.shift), mask);
      if (split) {
        const VecI bit = bit_and(shift_right(high, 8 * b + place.high_shift), set1(int32_t{1}));
        code = add(code, shift_left(bit, 2));
      }
      out[b] = table_ == nullptr ? to_float(code) : gather(table_, code);
    }
  }

 private:
  VecI line(int64_t at) const { return load(reinterpret_cast<const int32_t*>(page_ + at)); }

  const uint8_t* page_;
  int32_t bits_;
  int64_t panel_bytes_;
  const float* table_;
};

// Scales and mins of a panel. Of a channel axis: [channel]; of a token axis: [group][32 tokens].
struct Grid {
  alignas(64) float scales[kMaxPagedD + kPanelTokens];
  alignas(64) float mins[kMaxPagedD + kPanelTokens];

  Grid(const PagedAttentionArgs& a, const KVSide& side, const Panel& p) {
    if (side.axis == KVAxis::channel) {
      read(a, side, scale_at(a, side, p, 0), side.d, 0);
      return;
    }
    for (int64_t c = 0; c < side.d; c += side.group_size) {
      read(a, side, scale_at(a, side, p, c), kPanelTokens, c / side.group_size * kPanelTokens);
    }
  }

 private:
  void read(const PagedAttentionArgs& a, const KVSide& side, int64_t from, int64_t count,
            int64_t to) {
    read_floats(side.scales, a.kv.type, from, count, scales + to);
    read_floats(side.mins, a.kv.type, from, count, mins + to);
  }
};

// Calls body(token in the panel, channel, exact value) for the outliers of the first `count`
// tokens.
template <class Body>
OW_INLINE void for_each_outlier(const PagedAttentionArgs& a, const KVSide& side, const Panel& p,
                                int64_t count, const Body& body) {
  const int64_t begin = (p.page * a.kv.page_size + p.in_page) * side.outliers;
  for (int64_t i = 0; i < count * side.outliers; ++i) {
    const int64_t channel = side.outlier_index[begin + i];
    if (channel >= side.d) continue;
    body(i / side.outliers, channel, read_float(side.outlier_values, a.kv.type, begin + i));
  }
}

// Tokens of the panel that are in pages.
OW_INLINE int64_t in_pages(const KVSide& side, const Chunk& chunk, int64_t i) {
  const int64_t count = side.committed[chunk.item] - chunk.panel[i].token;
  return count < 0 ? 0 : min_of(count, chunk.count(i));
}
// Rows of a token that lies as it came: in a dense page, or in the ring.
template <class T>
OW_INLINE const T* token_row(const PagedAttentionArgs& a, const KVSide& side, const Chunk& chunk,
                             int64_t i, int64_t token) {
  const Panel& p = chunk.panel[i];
  if (is_dense(side)) {
    return reinterpret_cast<const T*>(dense_row(a, side, p)) + token * side.d;
  }
  const int64_t slot = (p.token + token) % a.kv.tail_len;
  return static_cast<const T*>(side.tail) + (chunk.item * a.kv.tail_len + slot) * side.d;
}

// A class and not functions, so that what belongs to one call stands together.
class PanelReader {
 public:
  explicit PanelReader(const PagedAttentionArgs& a) : a_(a) {}

  // Panel i of the chunk; columns past its count are zero or what pages hold.
  void keys(const Chunk& chunk, int64_t i, KeyPanel* out) const {
    const KVSide& side = a_.kv.keys;
    const int64_t packed = is_dense(side) ? 0 : in_pages(side, chunk, i);
    if (packed > 0) unpack_keys(chunk.panel[i], packed, out);
    with_type(a_.kv.type, nullptr,
              [&](const auto* type) { put_rows(chunk, i, packed, type, out); });
    if (a_.cos != nullptr) rotate(chunk, i, out);
  }

  void values(const Chunk& chunk, int64_t i, ValuePanel* out) const {
    const KVSide& side = a_.kv.values;
    const int64_t packed = is_dense(side) ? 0 : in_pages(side, chunk, i);
    if (packed > 0) unpack_values(chunk.panel[i], packed, out);
    with_type(a_.kv.type, nullptr, [&]<class T>(const T*) {
      for (int64_t token = packed; token < chunk.count(i); ++token) {
        const T* row = token_row<T>(a_, side, chunk, i, token);
        for (int64_t c = 0; c < side.d; c += kLanes) {
          store_n(out->at[token] + c, load_n(row + c, side.d - c), side.d - c);
        }
      }
    });
  }

 private:
  void unpack_keys(const Panel& p, int64_t count, KeyPanel* out) const {
    const KVSide& side = a_.kv.keys;
    const Grid grid(a_, side, p);
    const Codes codes(side, key_panel(a_, p), 0);
    const bool channel_axis = side.axis == KVAxis::channel;
    for (int64_t c = 0; c < side.d; c += 4) {
      for (int64_t n = 0; n < kPanelTokens; n += kLanes) {
        VecF code[4];
        codes.read(n, c, code);
        for (int64_t b = 0; b < min_of(4, side.d - c); ++b) {
          const int64_t at = channel_axis ? c + b : (c + b) / side.group_size * kPanelTokens + n;
          const VecF scale = channel_axis ? set1(grid.scales[at]) : load(grid.scales + at);
          const VecF min = channel_axis ? set1(grid.mins[at]) : load(grid.mins + at);
          store(out->at[c + b] + n, fma(code[b], scale, min));
        }
      }
    }
    for_each_outlier(a_, side, p, count, [&](int64_t token, int64_t channel, float value) {
      out->at[channel][token] = value;
    });
  }

  void unpack_values(const Panel& p, int64_t count, ValuePanel* out) const {
    const KVSide& side = a_.kv.values;
    const Grid grid(a_, side, p);
    const Codes codes(side, value_panel(a_, p, 0), panel_bytes(side.bits, a_.kv.page_size));
    const bool channel_axis = side.axis == KVAxis::channel;
    for (int64_t c = 0; c < side.d; c += kLanes) {
      for (int64_t t = 0; t < kPanelTokens; t += 4) {
        VecF code[4];
        codes.read(c, t, code);
        for (int64_t b = 0; b < 4; ++b) {
          const int64_t at = channel_axis ? c : c / side.group_size * kPanelTokens + t + b;
          const VecF scale = channel_axis ? load(grid.scales + at) : set1(grid.scales[at]);
          const VecF min = channel_axis ? load(grid.mins + at) : set1(grid.mins[at]);
          store_n(out->at[t + b] + c, fma(code[b], scale, min), side.d - c);
        }
      }
    }
    for_each_outlier(a_, side, p, count, [&](int64_t token, int64_t channel, float value) {
      out->at[token][channel] = value;
    });
  }

  // Tokens from `begin` on that lie as rows, transposed a square of lanes at a time.
  template <class T>
  void put_rows(const Chunk& chunk, int64_t i, int64_t begin, const T*, KeyPanel* out) const {
    const KVSide& side = a_.kv.keys;
    const int64_t count = chunk.count(i);
    for (int64_t n = begin / kLanes * kLanes; n < count; n += kLanes) {
      const T* rows[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        const bool is_row = n + l >= begin && n + l < count;
        rows[l] = is_row ? token_row<T>(a_, side, chunk, i, n + l) : nullptr;
      }
      for (int64_t c = 0; c < side.d; c += kLanes) {
        VecF square[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) {
          square[l] = rows[l] == nullptr ? set1(0.0f) : load_n(rows[l] + c, side.d - c);
        }
        transpose(square);
        for (int64_t l = 0; l < min_of(kLanes, side.d - c); ++l) {
          put_columns(out->at[c + l] + n, square[l], begin - n, count - n);
        }
      }
    }
  }
  // Lanes [begin, end) of `row`; those before stay.
  static void put_columns(float* to, VecF row, int64_t begin, int64_t end) {
    if (begin <= 0) return store(to, row);
    float lanes[kLanes];
    store(lanes, row);
    for (int64_t l = begin; l < min_of(kLanes, end); ++l) to[l] = lanes[l];
  }

  void rotate(const Chunk& chunk, int64_t i, KeyPanel* out) const {
    const int64_t half = a_.kv.keys.d / 2;
    const int64_t count = chunk.count(i);
    const int64_t token = chunk.panel[i].token;
    const int64_t places = a_.kv.max_pages * a_.kv.page_size;
    for (int64_t n = 0; n < count; n += kLanes) {
      int64_t row[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t t = token + min_of(n + l, count - 1);
        row[l] = half * (a_.kv.positions == nullptr ? t : a_.kv.positions[chunk.item * places + t]);
      }
      for (int64_t c = 0; c < half; c += kLanes) {
        VecF cos[kLanes], sin[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) {
          cos[l] = load_n(a_.cos + row[l] + c, half - c);
          sin[l] = load_n(a_.sin + row[l] + c, half - c);
        }
        transpose(cos);
        transpose(sin);
        for (int64_t l = 0; l < min_of(kLanes, half - c); ++l) {
          float* first = out->at[c + l] + n;
          float* second = out->at[c + l + half] + n;
          const VecF x = load(first);
          const VecF y = load(second);
          store(first, sub(mul(x, cos[l]), mul(y, sin[l])));
          store(second, fma(y, cos[l], mul(x, sin[l])));
        }
      }
    }
  }

  const PagedAttentionArgs& a_;
};

}  // namespace
}  // namespace ow::OW_TARGET
