// The panel kernel in terms of simd/vec.h, and how x and y are laid out for every kernel.
#pragma once

#include "kernels/nm_gemm/nm_gemm.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

OW_INLINE float read_float(const void* p, FloatType type, int64_t i) {
  switch (type) {
    case FloatType::f32: return static_cast<const float*>(p)[i];
    case FloatType::bf16: return ow::to_float(static_cast<const bf16*>(p)[i]);
    default: return ow::to_float(static_cast<const f16*>(p)[i]);
  }
}
OW_INLINE void write_float(void* p, FloatType type, int64_t i, float value) {
  switch (type) {
    case FloatType::f32: return ow::from_float(value, static_cast<float*>(p) + i);
    case FloatType::bf16: return ow::from_float(value, static_cast<bf16*>(p) + i);
    default: return ow::from_float(value, static_cast<f16*>(p) + i);
  }
}

// --- x in rows -----------------------------------------------------------------------------------
//
// float: [m, columns] fp32. int8: codes + 128 (the unsigned operand of vpdpbusd) in rows of
// code_stride bytes, of which a kernel may read 64 from any column on.

OW_INLINE int64_t code_stride(const NmGemmArgs& a) { return round_up(nm_columns(a), 64) + 64; }
OW_INLINE const uint8_t* laid_codes(const NmGemmArgs& a, int64_t row) {
  return static_cast<const uint8_t*>(a.laid) + row * code_stride(a);
}

template <class T>
OW_INLINE void lay_out_row(const NmGemmArgs& a, int64_t row) {
  const T* x = static_cast<const T*>(a.x) + row * a.k;
  float* out = static_cast<float*>(a.laid) + row * nm_columns(a);
  int64_t k = 0;
  for (; k + kLanes <= a.k; k += kLanes) store(out + k, load(x + k));
  for (; k < a.k; ++k) out[k] = ow::to_float(x[k]);
  for (; k < nm_columns(a); ++k) out[k] = 0.0f;
}

OW_INLINE void lay_out_codes(const NmGemmArgs& a, int64_t row) {
  const int8_t* x = static_cast<const int8_t*>(a.x) + row * a.k;
  uint8_t* out = static_cast<uint8_t*>(a.laid) + row * code_stride(a);
  for (int64_t k = 0; k < a.k; ++k) out[k] = uint8_t(x[k] + 128);
  memset(out + a.k, 128, size_t(code_stride(a) - a.k));
}

OW_INLINE int64_t laid_row_bytes(const NmGemmArgs& a) {
  return a.m * (a.int8 ? code_stride(a) : nm_columns(a) * int64_t(sizeof(float)));
}

OW_INLINE void lay_out_rows(const NmGemmArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (a.int8) {
      lay_out_codes(a, row);
      continue;
    }
    switch (a.y_type) {
      case FloatType::f32: lay_out_row<float>(a, row); break;
      case FloatType::bf16: lay_out_row<bf16>(a, row); break;
      case FloatType::f16: lay_out_row<f16>(a, row); break;
    }
  }
}

// --- y -------------------------------------------------------------------------------------------

template <class T>
OW_INLINE void finish_as(const NmGemmArgs& a, int64_t row, int64_t n, const float* totals) {
  for (int64_t i = 0; i < kNmPanel && n + i < a.n; i += kLanes) {
    const int64_t lanes = min_of(kLanes, a.n - n - i);
    const int64_t at = row * a.n + n + i;
    VecF value = load(totals + i);
    if (a.bias != nullptr) value = add(value, load_n(static_cast<const T*>(a.bias) + n + i, lanes));
    if (a.add != nullptr) value = add(value, load_n(static_cast<const T*>(a.add) + at, lanes));
    store_n(static_cast<T*>(a.y) + at, value, lanes);
  }
}

// y of one row and the 16 outputs from n on.
OW_INLINE void finish(const NmGemmArgs& a, int64_t row, int64_t n, const float* totals) {
  switch (a.y_type) {
    case FloatType::f32: return finish_as<float>(a, row, n, totals);
    case FloatType::bf16: return finish_as<bf16>(a, row, n, totals);
    case FloatType::f16: return finish_as<f16>(a, row, n, totals);
  }
}

// --- decoding ------------------------------------------------------------------------------------

// Slots of one unit of a panel, unpacked. Plain loops over 16 lanes: the compiler makes one vector
// instruction of each.
struct Tile {
  alignas(64) float weights[kNmUnit][kNmPanel];  // with their scales
  alignas(64) uint32_t columns[kNmUnit][kNmPanel];
};

// The index lines of a unit, one lane an output.
struct IndexLines {
  alignas(64) uint32_t words[5][kNmPanel];

  IndexLines(const NmGemmArgs& a, int64_t panel, int64_t unit) {
    const uint8_t* from = nm_unit_index(a, panel, unit);
    const int64_t lanes = nm_index_lanes(a.vector);
    for (int64_t line = 0; line < nm_index_bits(a.block); ++line, from += lanes * 4) {
      if (lanes == kNmPanel) {
        memcpy(words[line], from, 64);
        continue;
      }
      uint32_t shared[2] = {};
      memcpy(shared, from, size_t(lanes) * 4);
      for (int lane = 0; lane < kNmPanel; ++lane) words[line][lane] = shared[lane * lanes / 16];
    }
  }
};

// out[lane] = base + stride * index of slot s.
OW_INLINE void decode_columns(const IndexLines& lines, int32_t block, int64_t s, uint32_t base,
                              uint32_t stride, uint32_t* OW_RESTRICT out) {
  const int byte = int(s % 4 * 8);
  const int high = byte + int(s / 4);
  if (block <= 8) {
    const uint32_t* low = lines.words[s / 16];
    const int shift = byte + int(s / 4 % 4 * 2);
    for (int i = 0; i < kNmPanel; ++i) out[i] = low[i] >> shift & 3;
    if (block == 8) {
      for (int i = 0; i < kNmPanel; ++i) out[i] |= (lines.words[2][i] >> high & 1) << 2;
    }
  } else {
    const uint32_t* low = lines.words[s / 8];
    const int shift = byte + int(s / 4 % 2 * 4);
    for (int i = 0; i < kNmPanel; ++i) out[i] = low[i] >> shift & 15;
    if (block == 32) {
      for (int i = 0; i < kNmPanel; ++i) out[i] |= (lines.words[4][i] >> high & 1) << 4;
    }
  }
  for (int i = 0; i < kNmPanel; ++i) out[i] = base + stride * out[i];
}

// The stored numbers of slot s, without their scales.
OW_INLINE void decode_values(const uint8_t* unit, int32_t bits, int64_t s, float* OW_RESTRICT out) {
  uint32_t words[kNmPanel];
  memcpy(words, unit + s * bits / 32 * 64, 64);
  switch (bits) {
    case 32: memcpy(out, words, 64); break;
    case 16:
      for (int i = 0; i < kNmPanel; ++i) {
        out[i] = bits_to_float(s % 2 == 0 ? words[i] << 16 : words[i] & 0xffff0000u);
      }
      break;
    default:
      // The code to the top of the word, and down again with its sign.
      const int up = 32 - bits - int(s % 4 * 8 + (bits == 4 ? s / 4 % 2 * 4 : 0));
      for (int i = 0; i < kNmPanel; ++i) out[i] = float(int32_t(words[i] << up) >> (32 - bits));
  }
}

// The first vector of the 16 scales of a group.
OW_INLINE VecF load_scales(const NmGemmArgs& a, int64_t panel, int64_t g) {
  const int64_t at = (panel * a.groups + g) * kNmPanel;
  switch (a.scales_type) {
    case FloatType::f32: return load(static_cast<const float*>(a.scales) + at);
    case FloatType::bf16: return load(static_cast<const bf16*>(a.scales) + at);
    default: return load(static_cast<const f16*>(a.scales) + at);
  }
}

// Slots [begin, end) of a unit, of all slots of the row.
struct Slots {
  int64_t unit, begin, end;
};

// A tile of `slots`. Columns count from the first of the slot's block, or (kWhole) from the first
// of the row, and are multiplied by `stride`.
template <bool kWhole>
void decode(const NmGemmArgs& a, int64_t panel, Slots slots, uint32_t stride, Tile* tile) {
  const IndexLines lines(a, panel, slots.unit);
  const uint8_t* values = nm_unit_values(a, panel, slots.unit);
  int64_t scales_of = -1;
  alignas(64) float scales[kNmPanel];
  for (int64_t s = slots.begin; s < slots.end; ++s) {
    const int64_t first = (slots.unit * kNmUnit + s) / a.kept * a.block;
    decode_columns(lines, a.block, s, kWhole ? uint32_t(first) * stride : 0, stride,
                   tile->columns[s]);
    float* weights = tile->weights[s];
    decode_values(values, a.bits, s, weights);
    if (a.scales == nullptr) continue;
    // Slots of padding may lie past the last group.
    const int64_t g = min_of(first / a.group_size, a.groups - 1);
    if (g != scales_of) {
      const int64_t at = (panel * a.groups + g) * kNmPanel;
      for (int i = 0; i < kNmPanel; ++i) scales[i] = read_float(a.scales, a.scales_type, at + i);
      scales_of = g;
    }
    for (int i = 0; i < kNmPanel; ++i) weights[i] *= scales[i];
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
