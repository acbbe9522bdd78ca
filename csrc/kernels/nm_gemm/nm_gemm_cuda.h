// The product with an N:M sparse weight, its packing and expansion on a GPU (nm_gemm.cu,
// nm_gemm_pack.cu). Pointers are of device memory; the weight's are aligned to 16 bytes. All work
// is queued on `stream`, a cudaStream_t.
#pragma once

#include <stdint.h>

#include "cuda/status.h"
#include "kernels/nm_gemm/nm_gemm.h"

namespace ow {

// Scratch memory that launch_nm_gemm wants at args.laid, aligned to 16 bytes: 0 where x is read as
// it is.
int64_t nm_cuda_laid_bytes(const NmGemmArgs& args);

// At least one row. The index of a block ascends, as compress_nm makes it; what another comes to is
// undefined, but reads nothing outside of x and the weight.
LaunchStatus launch_nm_gemm(const NmGemmArgs& args, void* stream);

// What is wrong with a weight to be packed: of each kind the first, or kNmFaultless. Seen is in the
// low bits, its element above them.
struct NmFaults {
  uint64_t code;    // element << 8 | code
  uint64_t scale;   // element << 32 | bits of its float
  uint64_t excess;  // (group of outputs * blocks + block of columns) << 8 | kept
};
constexpr uint64_t kNmFaultless = ~uint64_t{0};

// `scratch` is as large as NmFaults; *faults is on the host, and written when this returns.
LaunchStatus launch_find_nm_faults(const NmPackArgs& args, FloatType scales_type, void* scratch,
                                   NmFaults* faults, void* stream);

// As compress_nm and expand_nm (nm_gemm.h).
LaunchStatus launch_compress_nm(const NmPackArgs& args, void* values, uint8_t* index,
                                void* packed_scales, void* stream);
LaunchStatus launch_expand_nm(const NmPackArgs& args, const void* values, const uint8_t* index,
                              const void* packed_scales, void* weight, void* scales, void* stream);

}  // namespace ow
