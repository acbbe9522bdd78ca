// 8 rows at a time: as fast as the weight can be read. That is all of up to 8 rows; of more only
// where groups are 16, which the kernel for tiles does not take, as few weights have them and each
// asks for two products. The warps of a block share a panel and split its k; weights and x pass
// through shared memory only to be on their way early: each thread reads back what it copied
// itself, so a warp waits for nothing but its own copies.
#include "cuda/device.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "kernels/lowbit_gemm/lowbit_gemm_panel_cuda.h"

namespace ow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Blocks of k of a warp that are on their way, and one that is multiplied: what fits in half of an
// A100's shared memory. 16 warps then have 40 KB or more of the weight on their way to a
// multiprocessor; HBM gives one of an H100 25 bytes a nanosecond, which is a latency of 1.6 us.
constexpr int kRingRoom = 72 << 10;
constexpr int kMostStages = 8;

// 16 bytes of every thread: pieces of the weight, then of x.
template <int kDigits, int kBits>
constexpr int kStagePieces = kPieces<kBits> + kDigits;
template <int kDigits, int kBits>
constexpr int kFitting = kRingRoom / (kStagePieces<kDigits, kBits> * kThreads * kPieceBytes);
template <int kDigits, int kBits>
constexpr int kStages =
    kFitting<kDigits, kBits> < kMostStages ? kFitting<kDigits, kBits> : kMostStages;
template <int kDigits, int kBits>
constexpr int kRingBytes =
    kStages<kDigits, kBits> * kStagePieces<kDigits, kBits> * kThreads * kPieceBytes;
// The sum of a warp, which lies behind.
constexpr int kShareSize = kRowTile * kTotalsRow<int(kPanel)>;

template <class X, int kDigits, int kBits>
class Ring {
 public:
  static constexpr int kCount = kStages<kDigits, kBits>;

  // Copies blocks one after another from `block` on.
  OW_DEVICE Ring(const LowbitGemmArgs& args, int64_t panel, int64_t row0, int block, int lane)
      : slot_(reinterpret_cast<uint4*>(dynamic_shared()) + threadIdx.x), lane_(lane) {
    w_ = args.w + (panel * (args.k_padded / kBlockK) + block) * kSpanBytes<kBits>;
    // The 16 bytes that hold 8 elements of this lane.
    const int at = lane % 4 * 8 * int(sizeof(X)) / kPieceBytes * kPieceBytes;
    OW_UNROLL
    for (int j = 0; j < kDigits; ++j) {
      const int64_t row = x_row<kDigits>(args, row0, j * kRowTile + lane / 4);
      const int64_t first = row * args.x_blocks.k_padded + block * kBlockK;
      x_[j] = static_cast<const uint8_t*>(args.x) + first * int(sizeof(X)) + at;
    }
  }

  OW_DEVICE void copy_next(int stage) {
    OW_UNROLL
    for (int p = 0; p < kPieces<kBits>; ++p) {
      ptx::cp_async_cg_16(at(stage, p), w_ + piece_at<kBits>(lane_, p), kPieceBytes);
    }
    w_ += kSpanBytes<kBits>;
    OW_UNROLL
    for (int j = 0; j < kDigits; ++j) {
      ptx::cp_async_cg_16(at(stage, kPieces<kBits> + j), x_[j], kPieceBytes);
      x_[j] += kBlockK * int(sizeof(X));
    }
  }

  OW_DEVICE void pieces(int stage, uint4 (&pieces)[kPieces<kBits>]) const {
    OW_UNROLL
    for (int p = 0; p < kPieces<kBits>; ++p) pieces[p] = *at(stage, p);
  }

  OW_DEVICE void read_x(int stage, int j, bool keep, uint32_t (&b)[2 * sizeof(X)]) const {
    const uint4 piece = *at(stage, kPieces<kBits> + j);
    if constexpr (sizeof(X) == 2) {
      const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
      OW_UNROLL
      for (int i = 0; i < 4; ++i) b[i] = keep ? words[i] : 0;
    } else {
      const bool second = lane_ % 2 != 0;
      b[0] = !keep ? 0 : second ? piece.z : piece.x;
      b[1] = !keep ? 0 : second ? piece.w : piece.y;
    }
  }

 private:
  OW_DEVICE uint4* at(int stage, int piece) const {
    return slot_ + (stage * kStagePieces<kDigits, kBits> + piece) * kThreads;
  }

  uint4* slot_;
  int lane_;
  const uint8_t* w_;
  const uint8_t* x_[kDigits];
};

// The sum of blocks first .. last - 1 of a panel.
template <class X, int kDigits, int kBits, bool kHalves>
OW_DEVICE void sum_blocks(const LowbitGemmArgs& args, int64_t panel, int64_t row0, int first,
                          int last, int lane, float* totals) {
  using Stages = Ring<X, kDigits, kBits>;
  Stages ring(args, panel, row0, first, lane);
  OW_UNROLL
  for (int s = 0; s < Stages::kCount - 1; ++s) {
    if (first + s < last) ring.copy_next(s);
    ptx::cp_async_commit_group();
  }
  PanelSum<X, kDigits, kBits, kDigits, kHalves> sum(args, panel, first, row0, lane);
  int stage = 0;
  int before = Stages::kCount - 1;
  for (int block = first; block < last; ++block) {
    ptx::cp_async_wait_group<Stages::kCount - 2>();
    // Into the stage that the block before was read from.
    if (block + Stages::kCount - 1 < last) ring.copy_next(before);
    ptx::cp_async_commit_group();
    uint4 pieces[kPieces<kBits>];
    ring.pieces(stage, pieces);
    sum.add(block, pieces, block + 1 == last,
            [&](int j, bool keep, auto& b) { ring.read_x(stage, j, keep, b); });
    before = stage;
    stage = stage + 1 == Stages::kCount ? 0 : stage + 1;
  }
  sum.template store<int(kPanel)>(totals);
}

template <class X, int kDigits, int kBits, bool kHalves>
__global__ void __launch_bounds__(kThreads, kRowsShape.blocks)
    lowbit_gemm_rows(const LowbitGemmTask task) {
  const int warp = int(threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  float* totals = reinterpret_cast<float*>(dynamic_shared() + kRingBytes<kDigits, kBits>);
  const Stripes& stripes = task.stripes;
  const int64_t end = first_unit(stripes, blockIdx.x + 1);
  for (int64_t unit = first_unit(stripes, blockIdx.x); unit < end;) {
    const Segment segment = segment_at(stripes, blockIdx.x, unit);
    const int begin = int(segment.begin);
    const int count = int(segment.end - segment.begin);
    sum_blocks<X, kDigits, kBits, kHalves>(
        task.args, segment.tile / task.row_tiles, segment.tile % task.row_tiles * kRowTile,
        begin + count * warp / kWarps, begin + count * (warp + 1) / kWarps, lane,
        totals + warp * kShareSize);
    __syncthreads();
    write_tile<kWarps, kRowTile, int(kPanel)>(task, segment, totals);
    __syncthreads();
    unit += count;
  }
}

template <class X, int kDigits, int kBits, bool kHalves>
LaunchStatus launch_rows(const LowbitGemmTask& task, void* stream) {
  constexpr int kBytes = kRingBytes<kDigits, kBits> + kWarps * kShareSize * int(sizeof(float));
  return launch("lowbit_gemm_rows", lowbit_gemm_rows<X, kDigits, kBits, kHalves>,
                dim3(unsigned(task.stripes.blocks)), kThreads, kBytes, stream, task);
}

}  // namespace

LaunchStatus launch_lowbit_gemm_rows(const LowbitGemmTask& task, void* stream) {
  return with_operands(task.args, [&]<class X, int kDigits, int kBits>() {
    return has_halves(task.args) ? launch_rows<X, kDigits, kBits, true>(task, stream)
                                 : launch_rows<X, kDigits, kBits, false>(task, stream);
  });
}

}  // namespace ow
