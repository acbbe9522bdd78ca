// The panel kernel in terms of simd/vec.h, and how x and y are laid out for every kernel.
#pragma once

#include "kernels/nm_gemm/nm_gemm.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

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

// y of a panel of outputs, for `width` rows from `row` on, from sums [16][width].
OW_INLINE void finish_tile(const NmGemmArgs& a, int64_t panel, int64_t row, int64_t width,
                           const float* sums) {
  for (int64_t t = 0; t < width; t += kLanes) {
    alignas(64) float totals[kLanes][kNmPanel];
    for (int64_t lane = 0; lane < kNmPanel; lane += kLanes) {
      VecF tile[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) tile[j] = load(sums + (lane + j) * width + t);
      transpose(tile);
      for (int64_t j = 0; j < kLanes; ++j) store(totals[j] + lane, tile[j]);
    }
    for (int64_t j = 0; j < min_of(kLanes, a.m - row - t); ++j) {
      finish(a, row + t + j, panel * kNmPanel, totals[j]);
    }
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

  IndexLines(const uint8_t* from, int64_t count, int64_t lanes) {
    if (lanes == kNmPanel) {
      memcpy(words, from, size_t(count) * 64);
      return;
    }
    // Spread from a copy: of words at a stride GCC 12 loads whole vectors, also past the last.
    uint32_t shared[5][2];
    if (lanes == 2) {
      memcpy(shared, from, size_t(count) * 8);
    } else {
      for (int64_t line = 0; line < count; ++line) {
        memcpy(&shared[line][0], from + line * 4, 4);
        shared[line][1] = shared[line][0];
      }
    }
    for (int64_t line = 0; line < count; ++line) {
      for (int i = 0; i < kNmPanel; ++i) words[line][i] = shared[line][i / 8];
    }
  }
};

// out[lane] = base + stride * index of slot s.
template <int kBlock>
OW_INLINE void decode_columns(const IndexLines& lines, uint32_t s, uint32_t base, uint32_t stride,
                              uint32_t* OW_RESTRICT out) {
  constexpr int kLow = kBlock <= 8 ? 2 : 4;  // bits of a field, and lines of fields
  const int byte = int(s % 4 * 8);
  const uint32_t* low = lines.words[s * kLow / kNmUnit];
  const int shift = byte + int(s / 4 % (8 / kLow) * kLow);
  if constexpr (kBlock == 8 || kBlock == 32) {
    const uint32_t* high = lines.words[kLow];
    const int high_shift = byte + int(s / 4);
    for (int i = 0; i < kNmPanel; ++i) {
      const uint32_t index = (low[i] >> shift & ((1 << kLow) - 1)) | (high[i] >> high_shift & 1)
                                                                         << kLow;
      out[i] = base + stride * index;
    }
  } else {
    for (int i = 0; i < kNmPanel; ++i) {
      out[i] = base + stride * (low[i] >> shift & ((1 << kLow) - 1));
    }
  }
}

// The stored numbers of slot s, without their scales.
template <int kBits>
OW_INLINE void decode_values(const uint8_t* unit, uint32_t s, float* OW_RESTRICT out) {
  uint32_t words[kNmPanel];
  memcpy(words, unit + s * kBits / 32 * 64, 64);
  if constexpr (kBits == 32) {
    memcpy(out, words, 64);
  } else if constexpr (kBits == 16) {
    const int up = s % 2 == 0 ? 16 : 0;
    for (int i = 0; i < kNmPanel; ++i) out[i] = bits_to_float(words[i] << up & 0xffff0000u);
  } else {
    // The code to the top of the word, and down again with its sign.
    const int up = 32 - kBits - int(s % 4 * 8 + (kBits == 4 ? s / 4 % 2 * 4 : 0));
    for (int i = 0; i < kNmPanel; ++i) out[i] = float(int32_t(words[i] << up) >> (32 - kBits));
  }
}

// A vector of the 16 scales of a group, from `lane` on.
OW_INLINE VecF load_scales(const NmGemmArgs& a, int64_t panel, int64_t g, int64_t lane = 0) {
  const int64_t at = (panel * a.groups + g) * kNmPanel + lane;
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
template <bool kWhole, int kBits, int kBlock>
void decode(const NmGemmArgs& a, int64_t panel, Slots slots, uint32_t stride, Tile* tile) {
  const IndexLines lines(nm_unit_index(a, panel, slots.unit), nm_index_bits(kBlock),
                         nm_index_lanes(a.vector));
  const uint8_t* values = nm_unit_values(a, panel, slots.unit);
  // Divided once, and then counted: a division takes as long as decoding two slots.
  const int64_t slot = slots.unit * kNmUnit + slots.begin;
  int64_t column = slot / a.kept * kBlock;  // the first of the slot's block
  int64_t left = a.kept - slot % a.kept;    // slots of the block
  int64_t g = -1;
  int64_t group_end = 0;  // the first column past group g
  VecF scales[kNmPanel / kLanes] = {};
  for (int64_t s = slots.begin; s < slots.end; ++s) {
    decode_columns<kBlock>(lines, uint32_t(s), kWhole ? uint32_t(column) * stride : 0, stride,
                           tile->columns[s]);
    float* weights = tile->weights[s];
    decode_values<kBits>(values, uint32_t(s), weights);
    if constexpr (kBits <= 8) {
      if (column >= group_end) {
        // Slots of padding may lie past the last group.
        g = min_of(g < 0 ? column / a.group_size : g + 1, a.groups - 1);
        group_end = (g + 1) * a.group_size;
        for (int64_t i = 0; i < kNmPanel / kLanes; ++i) {
          scales[i] = load_scales(a, panel, g, i * kLanes);
        }
      }
      for (int64_t i = 0; i < kNmPanel / kLanes; ++i) {
        store(weights + i * kLanes, mul(load(weights + i * kLanes), scales[i]));
      }
    }
    if (--left == 0) {
      left = a.kept;
      column += kBlock;
    }
  }
}

using DecodeFn = void (*)(const NmGemmArgs&, int64_t panel, Slots, uint32_t stride, Tile*);

template <bool kWhole, int kBits>
OW_INLINE DecodeFn decoder_of_block(int32_t block) {
  switch (block) {
    case 4: return decode<kWhole, kBits, 4>;
    case 8: return decode<kWhole, kBits, 8>;
    case 16: return decode<kWhole, kBits, 16>;
    default: return decode<kWhole, kBits, 32>;
  }
}
template <bool kWhole>
OW_INLINE DecodeFn decoder_of(const NmGemmArgs& a) {
  switch (a.bits) {
    case 4: return decoder_of_block<kWhole, 4>(a.block);
    case 8: return decoder_of_block<kWhole, 8>(a.block);
    case 16: return decoder_of_block<kWhole, 16>(a.block);
    default: return decoder_of_block<kWhole, 32>(a.block);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
