#include "cuda/device.h"

#include "core/types.h"
#include "cuda/launch.h"
#include "kernels/nm_gemm/nm_gemm_choice_cuda.h"
#include "kernels/nm_gemm/nm_gemm_cuda.h"

namespace ow {
namespace {

// Rows of 16-bit floats that copies of 16 bytes can fetch.
bool reads_x_directly(const NmGemmArgs& a) {
  return !a.int8 && nm_x_pieces(a) == 1 && a.k % 8 == 0 && uintptr_t(a.x) % 16 == 0;
}

NmRows rows_of(const NmGemmArgs& a) {
  const int64_t columns = round_up(a.k, 8);
  return {reads_x_directly(a) ? a.x : a.laid, columns, a.m * columns, int32_t(columns)};
}

// --- x -------------------------------------------------------------------------------------------

constexpr int kLayThreads = 256;

OW_DEVICE float to_float(int8_t code) { return float(code); }
using ow::to_float;

OW_DEVICE void pieces_of(float low, float high, f16, uint32_t (&pieces)[1]) {
  f16 halves[2];
  from_float(low, &halves[0]);
  from_float(high, &halves[1]);
  pieces[0] = halves[0].bits | uint32_t(halves[1].bits) << 16;
}
template <int kPieces>
OW_DEVICE void pieces_of(float low, float high, bf16, uint32_t (&pieces)[kPieces]) {
  split(low, high, pieces);
}

// Two columns a thread, `row_blocks` blocks a row; zero past k.
template <class X, class T, int kPieces>
__global__ void __launch_bounds__(kLayThreads)
    lay_out_rows(NmGemmArgs a, NmRows to, unsigned row_blocks) {
  const int64_t row = blockIdx.x / row_blocks;
  const int64_t k = (int64_t(blockIdx.x % row_blocks) * kLayThreads + threadIdx.x) * 2;
  if (k >= to.columns) return;
  const X* x = static_cast<const X*>(a.x) + row * a.k;
  const float low = k < a.k ? to_float(x[k]) : 0.0f;
  const float high = k + 1 < a.k ? to_float(x[k + 1]) : 0.0f;
  uint32_t pieces[kPieces];
  pieces_of(low, high, T{}, pieces);
  uint16_t* out = static_cast<uint16_t*>(a.laid) + row * to.stride + k;
  for (int piece = 0; piece < kPieces; ++piece) {
    *reinterpret_cast<uint32_t*>(out + piece * to.piece) = pieces[piece];
  }
}

template <class X, class T, int kPieces>
LaunchStatus launch_lay_out(const NmGemmArgs& a, const NmRows& to, void* stream) {
  const int64_t row_blocks = div_up(to.columns / 2, kLayThreads);
  return launch("lay_out_rows", lay_out_rows<X, T, kPieces>, dim3(unsigned(a.m * row_blocks)),
                kLayThreads, 0, stream, a, to, unsigned(row_blocks));
}

LaunchStatus launch_rows(const NmGemmArgs& a, const NmRows& to, void* stream) {
  if (a.int8) return launch_lay_out<int8_t, bf16, 1>(a, to, stream);
  if (nm_multiplies_f16(a)) return launch_lay_out<f16, f16, 1>(a, to, stream);
  switch (a.y_type) {
    case FloatType::bf16: return launch_lay_out<bf16, bf16, 1>(a, to, stream);
    case FloatType::f16: return launch_lay_out<f16, bf16, 3>(a, to, stream);
    default: return launch_lay_out<float, bf16, 3>(a, to, stream);
  }
}

// Columns after which a sum is scaled. int8 products are below 2^14, so that fp32 sums of 2^10 of
// them are exact.
int32_t span_of(const NmGemmArgs& a) {
  constexpr int64_t kExact = 1024;
  if (a.groups > 1) return int32_t(a.group_size);
  if (!a.int8) return int32_t(round_up(a.k, kNmTile));
  return int32_t(kExact / a.kept * a.block / kNmTile * kNmTile);
}

}  // namespace

int64_t nm_cuda_laid_bytes(const NmGemmArgs& args) {
  return reads_x_directly(args) ? 0 : nm_x_pieces(args) * args.m * round_up(args.k, 8) * 2;
}

LaunchStatus launch_nm_gemm(const NmGemmArgs& args, void* stream) {
  const NmRows x = rows_of(args);
  if (!reads_x_directly(args)) {
    const LaunchStatus status = launch_rows(args, x, stream);
    if (status.error != 0) return status;
  }
  return args.m <= kNmFewRows ? launch_nm_few(args, x, span_of(args), stream)
                              : launch_nm_many(args, x, span_of(args), stream);
}

}  // namespace ow
