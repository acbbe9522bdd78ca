#include "kernels/nm_gemm/nm_gemm.h"

namespace ow {
namespace {

// Whether weight (n, k) is kept.
bool keeps(const NmPackArgs& a, int64_t n, int64_t k) {
  const int64_t at = n * a.k + k;
  if (a.mask != nullptr) return a.mask[at] != 0;
  switch (a.bits) {
    case 32: return static_cast<const float*>(a.weight)[at] != 0.0f;
    case 16: return (static_cast<const bf16*>(a.weight)[at].bits & 0x7fff) != 0;
    default: return static_cast<const uint8_t*>(a.weight)[at] != 1 << (a.bits - 1);
  }
}

// The columns of a block, as bits, that any of outputs [begin, end) keeps.
uint32_t kept_columns(const NmPackArgs& a, int64_t begin, int64_t end, int64_t block) {
  uint32_t columns = 0;
  const int64_t count = min_of(a.block, a.k - block * a.block);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t j = 0; j < count; ++j) columns |= uint32_t{keeps(a, n, block * a.block + j)} << j;
  }
  return columns;
}

void put_index(uint8_t* unit, const NmPackArgs& a, int64_t lane, int64_t s, int64_t index) {
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

void put_value(uint8_t* unit, const NmPackArgs& a, int64_t lane, int64_t s, int64_t at) {
  const int64_t pair = s / 2 * 32 + lane * 2 + s % 2;
  switch (a.bits) {
    case 32:
      reinterpret_cast<float*>(unit)[s * kNmPanel + lane] = static_cast<const float*>(a.weight)[at];
      return;
    case 16: reinterpret_cast<bf16*>(unit)[pair] = static_cast<const bf16*>(a.weight)[at]; return;
  }
  const int value = static_cast<const uint8_t*>(a.weight)[at] - (1 << (a.bits - 1));
  if (a.bits == 8) {
    unit[s / 4 * 64 + lane * 4 + s % 4] = uint8_t(value);
  } else {
    unit[s / 8 * 64 + lane * 4 + s % 4] |= uint8_t((value & 15) << (s / 4 % 2 * 4));
  }
}

// Where the packed parts of an output's units begin.
struct Output {
  int64_t lane, index_lane;
  uint8_t *values, *index;
};
Output output_at(const NmPackArgs& a, int64_t n, uint8_t* values, uint8_t* index) {
  const int64_t units = nm_units(a.k, a.kept, a.block);
  const int64_t shared = nm_index_outputs(a.vector);
  const int64_t lane = n % kNmPanel;
  return {lane, n % shared * nm_index_lanes(a.vector) / shared,
          values + n / kNmPanel * units * nm_unit_value_bytes(a.bits),
          index + n / shared * units * nm_unit_index_bytes(a.block, a.vector)};
}

// One block of outputs [begin, end), which share an index.
void pack_block(const NmPackArgs& a, int64_t begin, int64_t end, int64_t block, uint8_t* values,
                uint8_t* index) {
  uint32_t columns = kept_columns(a, begin, end, block);
  for (int64_t j = 0; __builtin_popcount(columns) < a.kept; ++j) columns |= uint32_t{1} << j;
  int64_t s = block * a.kept;
  for (int64_t j = 0; j < a.block; ++j) {
    if ((columns >> j & 1) == 0) continue;
    const int64_t k = block * a.block + j;
    const Output first = output_at(a, begin, values, index);
    put_index(first.index + s / kNmUnit * nm_unit_index_bytes(a.block, a.vector), a,
              first.index_lane, s % kNmUnit, j);
    for (int64_t n = begin; n < end && k < a.k; ++n) {
      const Output to = output_at(a, n, values, index);
      uint8_t* unit = to.values + s / kNmUnit * nm_unit_value_bytes(a.bits);
      if (keeps(a, n, k)) put_value(unit, a, to.lane, s % kNmUnit, n * a.k + k);
    }
    ++s;
  }
}

// Copies scales between [n, groups] and [panels, groups, 16].
void copy_scales(const NmPackArgs& a, const void* from, void* to, bool pack) {
  for (int64_t n = 0; n < a.n; ++n) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t packed = (n / kNmPanel * a.groups + g) * kNmPanel + n % kNmPanel;
      const int64_t flat = n * a.groups + g;
      memcpy(static_cast<uint8_t*>(to) + (pack ? packed : flat) * a.scale_size,
             static_cast<const uint8_t*>(from) + (pack ? flat : packed) * a.scale_size,
             size_t(a.scale_size));
    }
  }
}

void expand_output(const NmPackArgs& a, int64_t n, uint8_t* values, uint8_t* index, void* weight) {
  const Output from = output_at(a, n, values, index);
  uint8_t* row = static_cast<uint8_t*>(weight) + n * a.k * div_up(a.bits, 8);
  // Zero of a float is all bits zero; of codes it is the zero point.
  memset(row, a.bits <= 8 ? 1 << (a.bits - 1) : 0, size_t(a.k * div_up(a.bits, 8)));
  const int64_t slots = nm_slots(a.k, a.kept, a.block);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t unit = slot / kNmUnit;
    const int64_t s = slot % kNmUnit;
    const uint8_t* unit_index = from.index + unit * nm_unit_index_bytes(a.block, a.vector);
    const uint8_t* unit_values = from.values + unit * nm_unit_value_bytes(a.bits);
    const int64_t k =
        slot / a.kept * a.block + nm_index_at(unit_index, a.block, a.vector, from.lane, s);
    if (k >= a.k) continue;
    switch (a.bits) {
      case 32: reinterpret_cast<float*>(row)[k] = nm_float_at(unit_values, 32, from.lane, s); break;
      case 16:
        memcpy(row + 2 * k, unit_values + (s / 2 * 32 + from.lane * 2 + s % 2) * 2, 2);
        break;
      default:
        row[k] = uint8_t(nm_code_at(unit_values, a.bits, from.lane, s) + (1 << (a.bits - 1)));
    }
  }
}

}  // namespace

NmExcess find_nm_excess(const NmPackArgs& a) {
  for (int64_t n = 0; n < a.n; n += a.vector) {
    for (int64_t block = 0; block < div_up(a.k, a.block); ++block) {
      const uint32_t columns = kept_columns(a, n, min_of(n + a.vector, a.n), block);
      const int64_t count = __builtin_popcount(columns);
      if (count > a.kept) return {n, block * a.block, count};
    }
  }
  return {0, 0, 0};
}

void compress_nm(const NmPackArgs& a, void* values, uint8_t* index, void* packed_scales,
                 const Parallel& parallel) {
  const int64_t units = nm_units(a.k, a.kept, a.block);
  const int64_t panels = div_up(a.n, kNmPanel);
  const int64_t outputs = nm_index_outputs(a.vector);
  uint8_t* bytes = static_cast<uint8_t*>(values);
  memset(bytes, 0, size_t(panels * units * nm_unit_value_bytes(a.bits)));
  memset(index, 0, size_t(div_up(a.n, outputs) * units * nm_unit_index_bytes(a.block, a.vector)));
  parallel.for_each(div_up(a.n, outputs), [&](int64_t i) {
    const int64_t last = min_of((i + 1) * outputs, a.n);
    for (int64_t n = i * outputs; n < last; n += a.vector) {
      const int64_t end = min_of(n + a.vector, a.n);
      for (int64_t block = 0; block < div_up(a.k, a.block); ++block) {
        pack_block(a, n, end, block, bytes, index);
      }
    }
  });
  if (a.scales == nullptr) return;
  memset(packed_scales, 0, size_t(panels * a.groups * kNmPanel * a.scale_size));
  copy_scales(a, a.scales, packed_scales, true);
}

void expand_nm(const NmPackArgs& a, const void* values, const uint8_t* index,
               const void* packed_scales, void* weight, void* scales, const Parallel& parallel) {
  // Only read through: Output serves both directions.
  uint8_t* bytes = static_cast<uint8_t*>(const_cast<void*>(values));
  uint8_t* lanes = const_cast<uint8_t*>(index);
  parallel.for_each(a.n, [&](int64_t n) { expand_output(a, n, bytes, lanes, weight); });
  if (packed_scales != nullptr) copy_scales(a, packed_scales, scales, false);
}

}  // namespace ow
