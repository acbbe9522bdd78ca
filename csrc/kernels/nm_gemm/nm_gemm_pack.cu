// Compressing and expanding on a GPU, by the functions of the CPU: a thread a unit or a block.
#include "cuda/device.h"

#include "cuda/faults.h"
#include "cuda/launch.h"
#include "kernels/nm_gemm/nm_gemm_cuda.h"
#include "kernels/nm_gemm/nm_gemm_pack_body.h"

namespace ow {
namespace {

constexpr int kThreads = 128;

OW_DEVICE int64_t thread_of_grid() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

template <class... Params, class... Args>
LaunchStatus launch_each(const char* name, void (*kernel)(Params...), int64_t count, void* stream,
                         Args... args) {
  if (count == 0) return {name, 0};
  const dim3 grid{unsigned(div_up(count, kThreads))};
  return launch(name, kernel, grid, kThreads, 0, stream, args...);
}

// A thread a group of outputs and block of columns.
__global__ void __launch_bounds__(kThreads) find_excess(NmPackArgs a, NmFaults* faults) {
  const int64_t blocks = div_up(a.k, a.block);
  const int64_t i = thread_of_grid();
  if (i >= div_up(a.n, a.vector) * blocks) return;
  const int64_t n = i / blocks * a.vector;
  const uint32_t columns = nm_kept_columns(a, n, min_of(n + a.vector, a.n), i % blocks);
  const int count = __builtin_popcount(columns);
  if (count > a.kept) keep_first(&faults->excess, i, 8, uint32_t(count));
}

// A thread a unit of a group of outputs, whose index bytes no other thread writes.
__global__ void __launch_bounds__(kThreads, 8)
    pack_units(NmPackArgs a, uint8_t* values, uint8_t* index) {
  const int64_t units = nm_units(a.k, a.kept, a.block);
  const int64_t i = thread_of_grid();
  if (i >= div_up(a.n, a.vector) * units) return;
  const int64_t n = i / units * a.vector;
  nm_pack_unit(a, n, min_of(n + a.vector, a.n), i % units, values, index);
}

// A thread a block of an output.
__global__ void __launch_bounds__(kThreads)
    expand_blocks(NmPackArgs a, uint8_t* values, uint8_t* index, uint8_t* weight) {
  const int64_t blocks = div_up(a.k, a.block);
  const int64_t i = thread_of_grid();
  if (i >= a.n * blocks) return;
  const int64_t n = i / blocks;
  uint8_t* row = weight + n * a.k * div_up(a.bits, 8);
  nm_expand_block(a, nm_output_at(a, n, values, index), i % blocks, row);
}

// A thread a scale. Word is as wide as a scale.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    copy_scales(NmPackArgs a, const Word* from, Word* to, bool pack) {
  const int64_t i = thread_of_grid();
  if (i >= a.n * a.groups) return;
  const int64_t packed = nm_scale_at(a, i / a.groups, i % a.groups);
  to[pack ? packed : i] = from[pack ? i : packed];
}

LaunchStatus launch_copy_scales(const NmPackArgs& a, const void* from, void* to, bool pack,
                                void* stream) {
  constexpr const char* kName = "copy_scales";
  const int64_t count = a.n * a.groups;
  if (a.scale_size == 4) {
    return launch_each(kName, copy_scales<uint32_t>, count, stream, a,
                       static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to), pack);
  }
  return launch_each(kName, copy_scales<uint16_t>, count, stream, a,
                     static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), pack);
}

}  // namespace

LaunchStatus launch_find_nm_faults(const NmPackArgs& a, FloatType scales_type, void* scratch,
                                   NmFaults* faults, void* stream) {
  NmFaults* found = static_cast<NmFaults*>(scratch);
  LaunchStatus status = fill_bytes(found, 0xff, sizeof(NmFaults), stream);
  if (status.error == 0 && a.bits < 8) {
    status = launch_each("find_wide_codes", find_wide_codes, a.n * a.k, stream,
                         static_cast<const uint8_t*>(a.weight), a.n * a.k, a.bits, &found->code);
  }
  if (status.error == 0 && a.scales != nullptr) {
    status = launch_each("find_infinite_scales", find_infinite_scales, a.n * a.groups, stream,
                         a.scales, scales_type, a.n * a.groups, &found->scale);
  }
  if (status.error == 0) {
    const int64_t blocks = div_up(a.n, a.vector) * div_up(a.k, a.block);
    status = launch_each("find_excess", find_excess, blocks, stream, a, found);
  }
  if (status.error != 0) return status;
  return read_back(faults, found, sizeof(NmFaults), stream);
}

LaunchStatus launch_compress_nm(const NmPackArgs& a, void* values, uint8_t* index,
                                void* packed_scales, void* stream) {
  const int64_t units = nm_units(a.k, a.kept, a.block);
  const int64_t panels = div_up(a.n, kNmPanel);
  const int64_t index_rows = div_up(a.n, nm_index_outputs(a.vector));
  LaunchStatus status = fill_bytes(values, 0, panels * units * nm_unit_value_bytes(a.bits), stream);
  if (status.error == 0) {
    status =
        fill_bytes(index, 0, index_rows * units * nm_unit_index_bytes(a.block, a.vector), stream);
  }
  if (status.error == 0) {
    status = launch_each("pack_units", pack_units, div_up(a.n, a.vector) * units, stream, a,
                         static_cast<uint8_t*>(values), index);
  }
  if (status.error != 0 || a.scales == nullptr) return status;
  status = fill_bytes(packed_scales, 0, panels * a.groups * kNmPanel * a.scale_size, stream);
  if (status.error != 0) return status;
  return launch_copy_scales(a, a.scales, packed_scales, true, stream);
}

LaunchStatus launch_expand_nm(const NmPackArgs& a, const void* values, const uint8_t* index,
                              const void* packed_scales, void* weight, void* scales, void* stream) {
  // Only read through: NmOutput serves both directions.
  const LaunchStatus status =
      launch_each("expand_blocks", expand_blocks, a.n * div_up(a.k, a.block), stream, a,
                  static_cast<uint8_t*>(const_cast<void*>(values)), const_cast<uint8_t*>(index),
                  static_cast<uint8_t*>(weight));
  if (status.error != 0 || packed_scales == nullptr) return status;
  return launch_copy_scales(a, packed_scales, scales, false, stream);
}

}  // namespace ow
