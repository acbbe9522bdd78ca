// The encoder in terms of simd/vec.h; each quantize_<tier>.cpp compiles it once.
#pragma once

#include "kernels/quantize/quantize.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Integer comparison of magnitudes orders NaN above infinity above every finite value, so the
// largest one also says whether the range is finite. Float max would lose a NaN.
template <class T>
OW_INLINE uint32_t largest_magnitude(const T* x, int64_t n) {
  VecI largest = set1(int32_t{0});
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = max_(largest, abs_bits(load(x + i)));
  if (i < n) largest = max_(largest, abs_bits(load_n(x + i, n - i)));
  return uint32_t(max_of_lanes(largest));
}

// Where the codes of one digit row go.
struct CodeRow {
  int8_t* base;
  int64_t k_shift;      // log2 of the k that lie together
  int64_t unit_stride;  // from those to the next

  static CodeRow of(const EncodeArgs& a, int64_t r) {
    return {a.codes + element_at(a.blocks, r, 0), __builtin_ctzll(uint64_t(a.blocks.k)),
            a.blocks.k * a.blocks.rows};
  }
  int8_t* at(int64_t k) const {
    return base + (k >> k_shift) * unit_stride + (k & ((int64_t{1} << k_shift) - 1));
  }
  // `lanes` codes from k on; whole vectors never cross 16 k.
  void put(int64_t k, VecI code, int64_t lanes) const {
    if (lanes == kLanes) {
      store_i8(at(k), code);
    } else {
      store_i8_n(at(k), code, lanes);
    }
  }
  void zero(int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; ++k) *at(k) = 0;
  }
};

constexpr uint32_t kInfinity = 0x7f800000;

template <class T>
void encode_row_int8(const EncodeArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
  const CodeRow codes = CodeRow::of(a, row);
  const int64_t groups = div_up(a.k, a.group_size);
  const uint32_t largest_bits = largest_magnitude(x, a.k);
  const float largest = bits_to_float(largest_bits);
  float scale = largest / 127.0f;
  float inverse = 127.0f / largest;
  if (largest_bits >= kInfinity) {
    scale = bits_to_float(0x7fc00000);
    inverse = 0.0f;
  } else if (largest < 0x1p-120f) {
    scale = inverse = 0.0f;
  }
  a.scales[row] = scale;
  if (inverse == 0.0f) {
    codes.zero(0, a.blocks.k_padded);
    if (a.sums != nullptr) memset(a.sums + row * groups, 0, size_t(groups) * 4);
    return;
  }
  const VecF factor = set1(inverse);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = min_of((g + 1) * a.group_size, a.k);
    VecI total = set1(int32_t{0});
    for (int64_t i = g * a.group_size; i < end; i += kLanes) {
      const int64_t lanes = min_of(kLanes, end - i);
      const VecF value = lanes == kLanes ? load(x + i) : load_n(x + i, lanes);
      const VecI code = to_int(mul(value, factor));
      codes.put(i, code, lanes);
      total = add(total, code);
    }
    if (a.sums != nullptr) a.sums[row * groups + g] = a.sum_factor * sum(total);
  }
  codes.zero(a.k, a.blocks.k_padded);
}

// The low base-256 digit, in -128..127.
OW_INLINE VecI low_digit(VecI value) { return shift_right(shift_left(value, 24), 24); }

template <class T>
void encode_row_fixed(const EncodeArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
  const CodeRow codes[3] = {CodeRow::of(a, row * 3), CodeRow::of(a, row * 3 + 1),
                            CodeRow::of(a, row * 3 + 2)};
  const int64_t groups = div_up(a.k, a.group_size);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * a.group_size;
    const int64_t end = min_of(begin + a.group_size, a.k);
    const uint32_t largest = largest_magnitude(x + begin, end - begin);
    const int32_t exponent = int32_t(largest >> 23) - 127;
    // 1.f * 2^22 is (2^23 + mantissa) / 2 and must not pass 8355711.
    const int32_t shift = (largest & 0x7fffff) > 2 * 8355711u - 0x800000u ? 21 : 22;
    float scale = bits_to_float(uint32_t(exponent - shift + 127) << 23);
    float inverse = bits_to_float(uint32_t(shift - exponent + 127) << 23);
    if (largest >= kInfinity) {
      scale = bits_to_float(0x7fc00000);
      inverse = 0.0f;
    } else if (exponent < -100) {
      scale = inverse = 0.0f;
    }
    a.scales[row * groups + g] = scale;
    const VecF factor = set1(inverse);
    VecI total[3] = {set1(int32_t{0}), set1(int32_t{0}), set1(int32_t{0})};
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t lanes = min_of(kLanes, end - i);
      const VecF value = lanes == kLanes ? load(x + i) : load_n(x + i, lanes);
      // A NaN times zero is NaN, which to_int would turn into INT_MIN.
      VecI rest = inverse == 0.0f ? set1(int32_t{0}) : to_int(mul(value, factor));
      for (int d = 2; d >= 0; --d) {
        const VecI digit = d == 0 ? rest : low_digit(rest);
        rest = shift_right(sub(rest, digit), 8);
        codes[d].put(i, digit, lanes);
        total[d] = add(total[d], digit);
      }
    }
    if (a.sums != nullptr) {
      for (int d = 0; d < 3; ++d) a.sums[(row * 3 + d) * groups + g] = a.sum_factor * sum(total[d]);
    }
  }
  for (const CodeRow& digit : codes) digit.zero(a.k, a.blocks.k_padded);
}

template <class T>
void encode_rows_typed(const EncodeArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (a.digits == 1) {
      encode_row_int8<T>(a, row);
    } else {
      encode_row_fixed<T>(a, row);
    }
  }
}

OW_INLINE void encode_rows_any(const EncodeArgs& a, int64_t begin, int64_t end) {
  switch (a.x_type) {
    case FloatType::f32: return encode_rows_typed<float>(a, begin, end);
    case FloatType::bf16: return encode_rows_typed<bf16>(a, begin, end);
    case FloatType::f16: return encode_rows_typed<f16>(a, begin, end);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
