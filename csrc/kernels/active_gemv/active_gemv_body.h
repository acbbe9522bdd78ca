// The kernel in terms of simd/vec.h; each active_gemv_<tier>.cpp compiles it once.
#pragma once

#include "kernels/active_gemv/active_gemv.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Active columns that are taken together: the sums of a chunk are loaded and stored once for them.
constexpr int kTogether = 4;

// sums[j] += x[0] * w_0[j], then x[1] * w_1[j], ... : the order of one column at a time.
template <int kColumns, class T>
OW_INLINE void add_columns(const T* const* w, const float* x, int64_t count, float* sums) {
  VecF broadcast[kColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) broadcast[c] = set1(x[c]);
  for (int64_t j = 0; j < count; j += kLanes) {
    VecF sum = load(sums + j);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sum = fma(broadcast[c], load(w[c] + j), sum);
    store(sums + j, sum);
  }
}

// The 32-bit lanes of a strip, kLanes of them, as integers.
OW_INLINE VecI strip_lanes(const uint8_t* p) {
  float lanes[kLanes];
  memcpy(lanes, p, sizeof(lanes));
  return as_int(load(lanes));
}

template <int kBits, int kColumns>
OW_INLINE void add_code_columns(const uint8_t* const* w, const float* x, int64_t count,
                                float* sums) {
  constexpr int kParts = 32 / kBits;
  VecF broadcast[kColumns];
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) broadcast[c] = set1(x[c]);
  for (int64_t strip = 0; strip < count; strip += 16 * kParts) {
    const int64_t byte = strip / (16 * kParts) * kStripBytes;
    for (int64_t l = 0; l < 16; l += kLanes) {
      VecI lanes[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) lanes[c] = strip_lanes(w[c] + byte + l * 4);
#pragma GCC unroll 16
      for (int part = 0; part < kParts; ++part) {
        float* at = sums + strip + part * 16 + l;
        VecF sum = load(at);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          const VecI top = shift_left(lanes[c], 32 - kBits - part * kBits);
          sum = fma(broadcast[c], to_float(shift_right(top, 32 - kBits)), sum);
        }
        store(at, sum);
      }
    }
  }
}

template <int kColumns>
OW_INLINE void add_codes(int32_t bits, const uint8_t* const* w, const float* x, int64_t count,
                         float* sums) {
  switch (bits) {
    case 2: return add_code_columns<2, kColumns>(w, x, count, sums);
    case 3: return add_code_columns<3, kColumns>(w, x, count, sums);
    case 4: return add_code_columns<4, kColumns>(w, x, count, sums);
    default: return add_code_columns<8, kColumns>(w, x, count, sums);
  }
}

// Active columns [from, to) of outputs [begin, begin + count) to sums.
template <class T>
OW_INLINE void add_active(const ActiveGemvArgs& a, int64_t from, int64_t to, int64_t begin,
                          int64_t count, float* sums) {
  const T* columns = static_cast<const T*>(a.columns) + begin;
  const T* w[kTogether];
  for (; from + kTogether <= to; from += kTogether) {
    for (int c = 0; c < kTogether; ++c) w[c] = columns + a.active.index[from + c] * a.n_padded;
    add_columns<kTogether>(w, a.active.x + from, count, sums);
  }
  for (; from < to; ++from) {
    w[0] = columns + a.active.index[from] * a.n_padded;
    add_columns<1>(w, a.active.x + from, count, sums);
  }
}

OW_INLINE void add_active_codes(const ActiveGemvArgs& a, int64_t from, int64_t to, int64_t begin,
                                int64_t count, float* sums) {
  const int64_t stride = strips_bytes(a.bits, a.n_padded);
  const uint8_t* columns = static_cast<const uint8_t*>(a.columns) + strips_bytes(a.bits, begin);
  const uint8_t* w[kTogether];
  for (; from + kTogether <= to; from += kTogether) {
    for (int c = 0; c < kTogether; ++c) w[c] = columns + a.active.index[from + c] * stride;
    add_codes<kTogether>(a.bits, w, a.active.x + from, count, sums);
  }
  for (; from < to; ++from) {
    w[0] = columns + a.active.index[from] * stride;
    add_codes<1>(a.bits, w, a.active.x + from, count, sums);
  }
}

// totals += scale * (sums - z' * sum of x) of one group, and sums = 0 for the next.
OW_INLINE void add_group(const ActiveGemvArgs& a, int64_t group, float x_sum, int64_t begin,
                         int64_t count, float* sums, float* totals) {
  const float* scales = a.scales + group * a.n_padded + begin;
  const uint8_t* zeros = a.zeros == nullptr ? nullptr : a.zeros + group * a.n_padded + begin;
  const float center = float(1 << (a.bits - 1));
  for (int64_t j = 0; j < count; j += kLanes) {
    VecF sum = load(sums + j);
    if (zeros != nullptr) {
      float z[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) z[l] = (center - float(zeros[j + l])) * x_sum;
      sum = add(sum, load(z));
    }
    store(totals + j, fma(load(scales + j), sum, load(totals + j)));
    store(sums + j, set1(0.0f));
  }
}

OW_INLINE void sum_codes(const ActiveGemvArgs& a, int64_t begin, int64_t count, float* totals) {
  float sums[kActiveChunk];
  memset(sums, 0, size_t(count) * sizeof(float));
  int64_t from = 0;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t to = a.active.group_end[g];
    if (from == to) continue;
    float x_sum = 0.0f;
    for (int64_t i = from; i < to; ++i) x_sum += a.active.x[i];
    add_active_codes(a, from, to, begin, count, sums);
    add_group(a, g, x_sum, begin, count, sums, totals);
    from = to;
  }
}

template <class T>
OW_INLINE void finish(const ActiveGemvArgs& a, int64_t begin, int64_t end, const float* totals) {
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t lanes = min_of(kLanes, end - n);
    VecF value = load(totals + (n - begin));
    if (a.bias != nullptr) value = add(value, load_n(static_cast<const T*>(a.bias) + n, lanes));
    if (a.add != nullptr) value = add(value, load_n(static_cast<const T*>(a.add) + n, lanes));
    store_n(static_cast<T*>(a.y) + n, value, lanes);
  }
}

void run(const ActiveGemvArgs& a, int64_t begin, int64_t end) {
  const int64_t strip = strip_outputs(a.bits);
  const int64_t step = kActiveChunk / strip * strip;
  for (int64_t chunk = begin; chunk < end; chunk += step) {
    const int64_t count = min_of(step, end - chunk);
    float totals[kActiveChunk];
    memset(totals, 0, size_t(count) * sizeof(float));
    switch (a.type) {
      case ColumnType::f32: add_active<float>(a, 0, a.active.count, chunk, count, totals); break;
      case ColumnType::bf16: add_active<bf16>(a, 0, a.active.count, chunk, count, totals); break;
      case ColumnType::codes: sum_codes(a, chunk, count, totals); break;
    }
    const int64_t n_end = min_of(chunk + count, a.n);
    switch (a.y_type) {
      case FloatType::f32: finish<float>(a, chunk, n_end, totals); break;
      case FloatType::bf16: finish<bf16>(a, chunk, n_end, totals); break;
      case FloatType::f16: finish<f16>(a, chunk, n_end, totals); break;
    }
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
