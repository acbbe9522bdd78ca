// Packing and expanding one unit or block of an N:M weight: what the CPU and a GPU do alike.
#pragma once

#include "core/types.h"
#include "kernels/nm_gemm/nm_gemm.h"

namespace ow {

// Whether weight (n, k) is kept.
OW_INLINE bool nm_keeps(const NmPackArgs& a, int64_t n, int64_t k) {
  const int64_t at = n * a.k + k;
  if (a.mask != nullptr) return a.mask[at] != 0;
  switch (a.bits) {
    case 32: return static_cast<const float*>(a.weight)[at] != 0.0f;
    case 16: return (static_cast<const uint16_t*>(a.weight)[at] & 0x7fff) != 0;
    default: return static_cast<const uint8_t*>(a.weight)[at] != 1 << (a.bits - 1);
  }
}

// The columns of a block, as bits, that any of outputs [begin, end) keeps.
OW_INLINE uint32_t nm_kept_columns(const NmPackArgs& a, int64_t begin, int64_t end, int64_t block) {
  uint32_t columns = 0;
  const int64_t count = min_of(a.block, a.k - block * a.block);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t j = 0; j < count; ++j) {
      columns |= uint32_t{nm_keeps(a, n, block * a.block + j)} << j;
    }
  }
  return columns;
}

OW_INLINE void nm_put_index(uint8_t* unit, const NmPackArgs& a, int64_t lane, int64_t s,
                            int64_t index) {
  uint8_t* byte = unit + lane * 4 + s % 4;
  const int64_t line = nm_index_lanes(a.vector) * 4;
  const int64_t low_bits = a.block <= 8 ? 2 : 4;
  const int64_t line_slots = kNmUnit / low_bits;  // there are as many lines as low bits
  const int64_t low = index & ((1 << low_bits) - 1);
  byte[s / line_slots * line] |= uint8_t(low << (s % line_slots / 4 * low_bits));
  if (nm_index_bits(a.block) > low_bits) {
    byte[low_bits * line] |= uint8_t((index >> low_bits) << (s / 4));
  }
}

OW_INLINE void nm_put_value(uint8_t* unit, const NmPackArgs& a, int64_t lane, int64_t s,
                            int64_t at) {
  const int64_t pair = s / 2 * 32 + lane * 2 + s % 2;
  switch (a.bits) {
    case 32:
      reinterpret_cast<float*>(unit)[s * kNmPanel + lane] = static_cast<const float*>(a.weight)[at];
      return;
    case 16:
      reinterpret_cast<uint16_t*>(unit)[pair] = static_cast<const uint16_t*>(a.weight)[at];
      return;
  }
  const int value = static_cast<const uint8_t*>(a.weight)[at] - (1 << (a.bits - 1));
  if (a.bits == 8) {
    unit[s / 4 * 64 + lane * 4 + s % 4] = uint8_t(value);
  } else {
    unit[s / 8 * 64 + lane * 4 + s % 4] |= uint8_t((value & 15) << (s / 4 % 2 * 4));
  }
}

// Where the packed parts of an output's units begin.
struct NmOutput {
  int64_t lane, index_lane;
  uint8_t *values, *index;
};
OW_INLINE NmOutput nm_output_at(const NmPackArgs& a, int64_t n, uint8_t* values, uint8_t* index) {
  const int64_t units = nm_units(a.k, a.kept, a.block);
  const int64_t shared = nm_index_outputs(a.vector);
  return {n % kNmPanel, n % shared * nm_index_lanes(a.vector) / shared,
          values + n / kNmPanel * units * nm_unit_value_bytes(a.bits),
          index + n / shared * units * nm_unit_index_bytes(a.block, a.vector)};
}

// One unit of outputs [begin, end), which share an index, to memory that is zero. A block whose
// slots lie in two units is looked at for each.
OW_INLINE void nm_pack_unit(const NmPackArgs& a, int64_t begin, int64_t end, int64_t unit,
                            uint8_t* values, uint8_t* index) {
  const NmOutput first = nm_output_at(a, begin, values, index);
  uint8_t* unit_index = first.index + unit * nm_unit_index_bytes(a.block, a.vector);
  const int64_t first_slot = unit * kNmUnit;
  const int64_t end_slot = min_of(first_slot + kNmUnit, nm_slots(a.k, a.kept, a.block));
  for (int64_t block = first_slot / a.kept; block * a.kept < end_slot; ++block) {
    uint32_t columns = nm_kept_columns(a, begin, end, block);
    for (int64_t j = 0; __builtin_popcount(columns) < a.kept; ++j) columns |= uint32_t{1} << j;
    int64_t slot = block * a.kept;
    for (int64_t j = 0; j < a.block; ++j) {
      if ((columns >> j & 1) == 0) continue;
      const int64_t s = slot++ - first_slot;
      if (s < 0 || s >= kNmUnit) continue;
      nm_put_index(unit_index, a, first.index_lane, s, j);
      const int64_t k = block * a.block + j;
      for (int64_t n = begin; n < end && k < a.k; ++n) {
        if (!nm_keeps(a, n, k)) continue;
        const NmOutput to = nm_output_at(a, n, values, index);
        nm_put_value(to.values + unit * nm_unit_value_bytes(a.bits), a, to.lane, s, n * a.k + k);
      }
    }
  }
}

// One block of an output, to `row`, where the columns of the weight's row n begin.
OW_INLINE void nm_expand_block(const NmPackArgs& a, const NmOutput& from, int64_t block,
                               uint8_t* row) {
  // Zero of a float is all bits zero; of codes it is the zero point.
  const int64_t size = div_up(a.bits, 8);
  const uint8_t zero = a.bits <= 8 ? uint8_t(1 << (a.bits - 1)) : uint8_t{0};
  const int64_t end = min_of((block + 1) * a.block, a.k);
  for (int64_t i = block * a.block * size; i < end * size; ++i) row[i] = zero;
  for (int64_t slot = block * a.kept; slot < (block + 1) * a.kept; ++slot) {
    const int64_t s = slot % kNmUnit;
    const uint8_t* index = from.index + slot / kNmUnit * nm_unit_index_bytes(a.block, a.vector);
    const uint8_t* values = from.values + slot / kNmUnit * nm_unit_value_bytes(a.bits);
    const int64_t k = block * a.block + nm_index_at(index, a.block, a.vector, from.lane, s);
    if (k >= a.k) continue;
    switch (a.bits) {
      case 32: reinterpret_cast<float*>(row)[k] = nm_float_at(values, 32, from.lane, s); break;
      case 16:
        reinterpret_cast<uint16_t*>(row)[k] =
            reinterpret_cast<const uint16_t*>(values)[s / 2 * 32 + from.lane * 2 + s % 2];
        break;
      default: row[k] = uint8_t(nm_code_at(values, a.bits, from.lane, s) + (1 << (a.bits - 1)));
    }
  }
}

// Where the scale (n, g) is in [panels, groups, 16].
OW_INLINE int64_t nm_scale_at(const NmPackArgs& a, int64_t n, int64_t g) {
  return (n / kNmPanel * a.groups + g) * kNmPanel + n % kNmPanel;
}

}  // namespace ow
