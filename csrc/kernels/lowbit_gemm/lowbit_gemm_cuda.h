// The family on a GPU (lowbit_gemm*.cu). Pointers are of device memory, `stream` is a cudaStream_t.
#pragma once

#include "cuda/status.h"
#include "kernels/lowbit_gemm/lowbit_gemm.h"

namespace ow {

// How rows of x lie, row after row; digits = 0 is rows of y_type. A GPU has no use for x_sums.
OW_INLINE RowBlocks lowbit_gemm_cuda_x_blocks(int64_t k) { return {1, kPadK, round_up(k, kPadK)}; }

// At least one row. `multiprocessors` are those of the device; parts has room for
// lowbit_gemm_part_count floats.
int64_t lowbit_gemm_part_count(const LowbitGemmArgs& args, int multiprocessors);
LaunchStatus launch_lowbit_gemm(const LowbitGemmArgs& args, int multiprocessors, float* parts,
                                void* stream);

// Rows of 16-bit floats x [m, k] to out [m, k_padded], zero past k.
LaunchStatus launch_pad_rows(const void* x, int64_t m, int64_t k, void* out, void* stream);

// What is wrong with a weight to be packed: of each kind the first (cuda/faults.h).
struct LowbitFaults {
  uint64_t code, zero;  // element << 8 | code
  uint64_t scale;       // element << 32 | bits of its float
};
constexpr uint64_t kLowbitFaultless = ~uint64_t{0};

// `scratch` is as large as LowbitFaults; *faults is on the host, and written when this returns.
LaunchStatus launch_find_lowbit_faults(const LowbitPackArgs& args, const uint8_t* codes,
                                       const void* scales, FloatType scales_type,
                                       const uint8_t* zeros, void* scratch, LowbitFaults* faults,
                                       void* stream);

// As the functions of the same names; at least one row.
LaunchStatus launch_pack_lowbit(const LowbitPackArgs& args, const uint8_t* codes,
                                const void* scales, const uint8_t* zeros, uint8_t* packed,
                                void* packed_scales, uint8_t* packed_zeros, void* stream);
LaunchStatus launch_unpack_lowbit(const LowbitPackArgs& args, const uint8_t* packed,
                                  const void* packed_scales, const uint8_t* packed_zeros,
                                  uint8_t* codes, void* scales, uint8_t* zeros, void* stream);
// A row outside 0 .. n - 1 gives NaNs: to refuse it, the host would have to wait for the device.
LaunchStatus launch_lowbit_rows(const LowbitRowsArgs& args, int64_t n, void* stream);

}  // namespace ow
