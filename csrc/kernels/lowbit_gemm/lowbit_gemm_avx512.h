// What the AVX-512 kernels of this family share: unpacking a unit, and finishing outputs.
#pragma once

#include <immintrin.h>

#include "kernels/lowbit_gemm/lowbit_gemm.h"
#include "simd/codes_avx512.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// The first line of half h of a panel; h counts on through the panels.
OW_INLINE const uint8_t* half_of(const LowbitGemmArgs& a, int64_t panel, int64_t h) {
  return a.w + (panel + h / 2) * panel_bytes(a.bits, a.k_padded) +
         h % 2 * (block_bytes(a.bits) / 2);
}
// Where the 16 scales or zeros of half h and group g are.
OW_INLINE int64_t group_at(const LowbitGemmArgs& a, int64_t panel, int64_t h, int64_t g) {
  return ((panel + h / 2) * a.groups + g) * kPanel + h % 2 * kHalf;
}

// Units of a group; the last unit of a row may be padding past k.
OW_INLINE int64_t group_unit_begin(const LowbitGemmArgs& a, int64_t g) {
  return g * a.group_size / kUnit;
}
OW_INLINE int64_t group_unit_end(const LowbitGemmArgs& a, int64_t g) {
  return div_up(min_of((g + 1) * a.group_size, a.k), kUnit);
}

OW_INLINE VecF load_scales(const LowbitGemmArgs& a, int64_t at) {
  switch (a.w_scales_type) {
    case FloatType::f32: return load(static_cast<const float*>(a.w_scales) + at);
    case FloatType::bf16: return load(static_cast<const bf16*>(a.w_scales) + at);
    default: return load(static_cast<const f16*>(a.w_scales) + at);
  }
}
OW_INLINE __m512i load_zeros(const LowbitGemmArgs& a, int64_t at) {
  const __m128i* p = reinterpret_cast<const __m128i*>(a.w_zeros + at);
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(p));
}

// Fetches the weight of the next tile into the cache while this one is multiplied, a share with
// each block of rows: unpacking would otherwise wait for memory while the multipliers rest.
class NextTile {
 public:
  // `panels` panels from `panel` on, units [unit, unit + units); `blocks` blocks of rows.
  NextTile(const LowbitGemmArgs& a, int64_t panel, int64_t panels, int64_t unit, int64_t units,
           int64_t blocks)
      : bytes_(units * kUnit * 4 * a.bits), share_(round_up(div_up(bytes_, blocks), 64)) {
    for (int64_t p = 0; p < panels; ++p) {
      begin_[p] = a.w + (panel + p) * panel_bytes(a.bits, a.k_padded) + unit * kUnit * 4 * a.bits;
    }
  }
  void fetch_share() {
    const int64_t end = min_of(done_ + share_, bytes_);
    for (; done_ < end; done_ += 64) {
      for (const uint8_t* begin : begin_) {
        if (begin != nullptr) _mm_prefetch(begin + done_, _MM_HINT_T1);
      }
    }
  }

 private:
  const uint8_t* begin_[2] = {nullptr, nullptr};
  int64_t bytes_;  // of one panel
  int64_t share_;
  int64_t done_ = 0;
};

// The tile, of kPanels panels, after units [.., unit_end) of the panels from `panel` on, of panels
// up to `end`.
template <int kPanels>
OW_INLINE NextTile next_tile(const LowbitGemmArgs& a, int64_t panel, int64_t end, int64_t unit_end,
                             int64_t tile_units, int64_t blocks) {
  const int64_t row_units = div_up(a.k, kUnit);
  if (unit_end >= row_units) {
    panel += kPanels;
    unit_end = 0;
  }
  const int64_t panels = panel < end ? min_of(kPanels, end - panel) : 0;
  return NextTile(a, panel, panels, unit_end, min_of(tile_units, row_units - unit_end), blocks);
}

// The sum of one row's group from its accumulators: an int32, or three base-256 digits.
template <int kDigits>
OW_INLINE VecF group_sum(const __m512i* digits, int64_t stride, float scale) {
  VecF sum = to_float(VecI{digits[0]});
  if constexpr (kDigits == 3) {
    const VecF middle = to_float(VecI{digits[stride]});
    const VecF low = to_float(VecI{digits[2 * stride]});
    sum = fma(sum, set1(65536.0f), fma(middle, set1(256.0f), low));
    sum = mul(sum, set1(scale));
  }
  return sum;
}

template <int kN>
struct RowBlock {
  static constexpr int kRows = kN;
};
// Calls body(first row, RowBlock<size>) over `rows` rows: whole blocks, and the rest in the largest
// pieces that a kernel is made for.
template <int kBlock, class Body>
OW_INLINE void for_each_row_block(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) body(r, RowBlock<kBlock>{});
  if constexpr (kBlock > 3) {
    for (; r + 3 <= rows; r += 3) body(r, RowBlock<3>{});
  }
  if constexpr (kBlock > 2) {
    for (; r + 2 <= rows; r += 2) body(r, RowBlock<2>{});
  }
  for (; r < rows; ++r) body(r, RowBlock<1>{});
}

template <class T>
OW_INLINE void finish_row(const LowbitGemmArgs& a, int64_t row, int64_t n, VecF value) {
  const int64_t lanes = min_of(kHalf, a.n - n);
  if (lanes <= 0) return;  // the second half of the last panel may be all padding
  if (a.bias != nullptr) value = add(value, load_n(static_cast<const T*>(a.bias) + n, lanes));
  const int64_t at = row * a.n + n;
  if (a.add != nullptr) value = add(value, load_n(static_cast<const T*>(a.add) + at, lanes));
  store_n(static_cast<T*>(a.y) + at, value, lanes);
}

// y of one row and outputs n .. n + 15 from their totals.
OW_INLINE void finish(const LowbitGemmArgs& a, int64_t row, int64_t n, const float* total) {
  VecF value = load(total);
  if (a.digits == 1) value = mul(value, set1(a.x_scales[row]));
  switch (a.y_type) {
    case FloatType::f32: return finish_row<float>(a, row, n, value);
    case FloatType::bf16: return finish_row<bf16>(a, row, n, value);
    case FloatType::f16: return finish_row<f16>(a, row, n, value);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
