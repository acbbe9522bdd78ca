#include "cuda/device.h"

#include "core/types.h"
#include "cuda/launch.h"
#include "kernels/nm_gemm/nm_gemm_cuda.h"
#include "kernels/nm_gemm/nm_gemm_few_cuda.h"
#include "kernels/nm_gemm/nm_gemm_many_cuda.h"

namespace ow {
namespace {

// fp16 where x is, and the weight's values are or are codes; else bf16, of which anything else can
// be made.
bool multiplies_f16(const NmGemmArgs& a) {
  const bool exact = a.bits <= 8 || (a.bits == 16 && a.value_type == FloatType::f16);
  return !a.int8 && a.y_type == FloatType::f16 && exact;
}
int x_pieces(const NmGemmArgs& a) {
  return a.int8 || a.y_type == FloatType::bf16 || multiplies_f16(a) ? 1 : 3;
}
// Rows of 16-bit floats that copies of 16 bytes can fetch.
bool reads_x_directly(const NmGemmArgs& a) {
  return !a.int8 && x_pieces(a) == 1 && a.k % 8 == 0 && uintptr_t(a.x) % 16 == 0;
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

// Two columns a thread; zero past k.
template <class X, class T, int kPieces>
__global__ void __launch_bounds__(kLayThreads) lay_out_rows(NmGemmArgs a, NmRows to) {
  const int64_t i = int64_t(blockIdx.x) * kLayThreads + threadIdx.x;
  const int64_t row = i / (to.columns / 2);
  const int64_t k = i % (to.columns / 2) * 2;
  if (row >= a.m) return;
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
  const dim3 grid{unsigned(div_up(a.m * (to.columns / 2), kLayThreads))};
  return launch("lay_out_rows", lay_out_rows<X, T, kPieces>, grid, kLayThreads, 0, stream, a, to);
}

LaunchStatus launch_rows(const NmGemmArgs& a, const NmRows& to, void* stream) {
  if (a.int8) return launch_lay_out<int8_t, bf16, 1>(a, to, stream);
  if (multiplies_f16(a)) return launch_lay_out<f16, f16, 1>(a, to, stream);
  switch (a.y_type) {
    case FloatType::bf16: return launch_lay_out<bf16, bf16, 1>(a, to, stream);
    case FloatType::f16: return launch_lay_out<f16, bf16, 3>(a, to, stream);
    default: return launch_lay_out<float, bf16, 3>(a, to, stream);
  }
}

// --- The product ---------------------------------------------------------------------------------

// Columns after which a sum is scaled. int8 products are below 2^14, so that fp32 sums of 2^10 of
// them are exact.
int32_t span_of(const NmGemmArgs& a) {
  constexpr int64_t kExact = 1024;
  if (a.groups > 1) return int32_t(a.group_size);
  if (!a.int8) return int32_t(round_up(a.k, kNmTile));
  return int32_t(kExact / a.kept * a.block / kNmTile * kNmTile);
}

template <class Stream, class Tiles, int kXPieces>
LaunchStatus launch_product(const NmGemmArgs& a, const NmRows& x, void* stream) {
  const int64_t panels = div_up(a.n, kNmPanel);
  if (a.m <= kNmFewRows) {
    const int32_t span = int32_t(min_of(span_of(a), kNmTile));
    return launch("nm_few", nm_few<Stream, kXPieces>, dim3(unsigned(panels)), kNmFewThreads,
                  Stream::kSharedBytes, stream, a, x, span);
  }
  using Shape = NmManyShape<Tiles, kXPieces>;
  const int64_t blocks = div_up(panels, kNmPanels) * div_up(a.m, Shape::kTokens);
  return launch("nm_many", nm_many<Tiles, kXPieces>, dim3(unsigned(blocks)), kNmManyThreads,
                Shape::kSharedBytes, stream, a, x, span_of(a));
}

template <class T, int kBits, int kXPieces>
LaunchStatus launch_sparse(const NmGemmArgs& a, const NmRows& x, void* stream) {
  return launch_product<NmSparseStream<T, kBits>, NmSparseTiles<T, kBits>, kXPieces>(a, x, stream);
}
template <class T, int kPieces, int kXPieces>
LaunchStatus launch_dense(const NmGemmArgs& a, const NmRows& x, void* stream) {
  return launch_product<NmDenseStream<T, kPieces>, NmDenseTiles<T, kPieces>, kXPieces>(a, x,
                                                                                       stream);
}

LaunchStatus launch_f16(const NmGemmArgs& a, const NmRows& x, void* stream) {
  if (a.kept != 2 || a.block != 4) return launch_dense<f16, 1, 1>(a, x, stream);
  switch (a.bits) {
    case 4: return launch_sparse<f16, 4, 1>(a, x, stream);
    case 8: return launch_sparse<f16, 8, 1>(a, x, stream);
    default: return launch_sparse<f16, 16, 1>(a, x, stream);
  }
}

template <int kXPieces>
LaunchStatus launch_bf16(const NmGemmArgs& a, const NmRows& x, void* stream) {
  const bool f16_values = a.bits == 16 && a.value_type == FloatType::f16;
  if (a.kept == 2 && a.block == 4 && !f16_values) {
    switch (a.bits) {
      case 4: return launch_sparse<bf16, 4, kXPieces>(a, x, stream);
      case 8: return launch_sparse<bf16, 8, kXPieces>(a, x, stream);
      case 16: return launch_sparse<bf16, 16, kXPieces>(a, x, stream);
      default: return launch_sparse<bf16, 32, kXPieces>(a, x, stream);
    }
  }
  if (a.bits == 32 || f16_values) return launch_dense<bf16, 3, kXPieces>(a, x, stream);
  return launch_dense<bf16, 1, kXPieces>(a, x, stream);
}

}  // namespace

int64_t nm_cuda_laid_bytes(const NmGemmArgs& args) {
  return reads_x_directly(args) ? 0 : x_pieces(args) * args.m * round_up(args.k, 8) * 2;
}

LaunchStatus launch_nm_gemm(const NmGemmArgs& args, void* stream) {
  const NmRows x = rows_of(args);
  if (!reads_x_directly(args)) {
    const LaunchStatus status = launch_rows(args, x, stream);
    if (status.error != 0) return status;
  }
  if (multiplies_f16(args)) return launch_f16(args, x, stream);
  return x_pieces(args) == 1 ? launch_bf16<1>(args, x, stream) : launch_bf16<3>(args, x, stream);
}

}  // namespace ow
