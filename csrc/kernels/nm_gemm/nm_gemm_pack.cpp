#include "kernels/nm_gemm/nm_gemm_pack_body.h"

namespace ow {
namespace {

// Copies scales between [n, groups] and [panels, groups, 16].
void copy_scales(const NmPackArgs& a, const void* from, void* to, bool pack) {
  for (int64_t n = 0; n < a.n; ++n) {
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t packed = nm_scale_at(a, n, g);
      const int64_t flat = n * a.groups + g;
      memcpy(static_cast<uint8_t*>(to) + (pack ? packed : flat) * a.scale_size,
             static_cast<const uint8_t*>(from) + (pack ? flat : packed) * a.scale_size,
             size_t(a.scale_size));
    }
  }
}

}  // namespace

NmExcess find_nm_excess(const NmPackArgs& a) {
  for (int64_t n = 0; n < a.n; n += a.vector) {
    for (int64_t block = 0; block < div_up(a.k, a.block); ++block) {
      const uint32_t columns = nm_kept_columns(a, n, min_of(n + a.vector, a.n), block);
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
      for (int64_t unit = 0; unit < units; ++unit) {
        nm_pack_unit(a, n, min_of(n + a.vector, a.n), unit, bytes, index);
      }
    }
  });
  if (a.scales == nullptr) return;
  memset(packed_scales, 0, size_t(panels * a.groups * kNmPanel * a.scale_size));
  copy_scales(a, a.scales, packed_scales, true);
}

void expand_nm(const NmPackArgs& a, const void* values, const uint8_t* index,
               const void* packed_scales, void* weight, void* scales, const Parallel& parallel) {
  // Only read through: NmOutput serves both directions.
  uint8_t* bytes = static_cast<uint8_t*>(const_cast<void*>(values));
  uint8_t* lanes = const_cast<uint8_t*>(index);
  parallel.for_each(a.n, [&](int64_t n) {
    const NmOutput from = nm_output_at(a, n, bytes, lanes);
    uint8_t* row = static_cast<uint8_t*>(weight) + n * a.k * div_up(a.bits, 8);
    for (int64_t block = 0; block < div_up(a.k, a.block); ++block) {
      nm_expand_block(a, from, block, row);
    }
  });
  if (packed_scales != nullptr) copy_scales(a, packed_scales, scales, false);
}

}  // namespace ow
