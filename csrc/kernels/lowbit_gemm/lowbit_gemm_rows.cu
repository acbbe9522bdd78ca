// Up to 8 rows: as fast as the weight can be read. The warps of a block share a panel and split its
// k; weights and x pass through shared memory only to be on their way early: each thread reads back
// what it copied itself, so a warp waits for nothing but its own copies.
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
constexpr int kShareSize = kRowTile * int(kPanel);

template <class X, int kDigits, int kBits>
class Ring {
 public:
  static constexpr int kCount = kStages<kDigits, kBits>;

  OW_DEVICE Ring(const LowbitGemmArgs& args, int64_t panel, int lane)
      : slot_(reinterpret_cast<uint4*>(dynamic_shared()) + threadIdx.x), lane_(lane) {
    w_ = args.w + panel * (args.k_padded / kBlockK * kSpanBytes<kBits>);
    // The 16 bytes that hold 8 elements of this lane.
    const int at = lane % 4 * 8 * int(sizeof(X)) / kPieceBytes * kPieceBytes;
    OW_UNROLL
    for (int j = 0; j < kDigits; ++j) {
      const int64_t row = x_row<kDigits>(args, 0, j * kRowTile + lane / 4);
      x_[j] = static_cast<const uint8_t*>(args.x) + row * args.x_blocks.k_padded * sizeof(X) + at;
    }
  }

  OW_DEVICE void copy(int stage, int block) {
    OW_UNROLL
    for (int p = 0; p < kPieces<kBits>; ++p) {
      const uint8_t* from = w_ + int64_t(block) * kSpanBytes<kBits> + piece_at<kBits>(lane_, p);
      ptx::cp_async_cg_16(at(stage, p), from, kPieceBytes);
    }
    OW_UNROLL
    for (int j = 0; j < kDigits; ++j) {
      const uint8_t* from = x_[j] + int64_t(block) * kBlockK * sizeof(X);
      ptx::cp_async_cg_16(at(stage, kPieces<kBits> + j), from, kPieceBytes);
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
template <class X, int kDigits, int kBits>
OW_DEVICE void sum_blocks(const LowbitGemmArgs& args, int64_t panel, int first, int last, int lane,
                          float* totals) {
  using Stages = Ring<X, kDigits, kBits>;
  Stages ring(args, panel, lane);
  OW_UNROLL
  for (int s = 0; s < Stages::kCount - 1; ++s) {
    if (first + s < last) ring.copy(s, first + s);
    ptx::cp_async_commit_group();
  }
  PanelSum<X, kDigits, kBits, kDigits> sum(args, panel, first, 0, lane);
  int stage = 0;
  for (int block = first; block < last; ++block) {
    ptx::cp_async_wait_group<Stages::kCount - 2>();
    // Into the stage that the block before was read from.
    const int ahead = block + Stages::kCount - 1;
    if (ahead < last) ring.copy((stage + Stages::kCount - 1) % Stages::kCount, ahead);
    ptx::cp_async_commit_group();
    uint4 pieces[kPieces<kBits>];
    ring.pieces(stage, pieces);
    sum.add(block, pieces, block + 1 == last,
            [&](int j, bool keep, auto& b) { ring.read_x(stage, j, keep, b); });
    stage = (stage + 1) % Stages::kCount;
  }
  sum.template store<int(kPanel)>(totals);
}

template <class X, int kDigits, int kBits>
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
    sum_blocks<X, kDigits, kBits>(task.args, segment.tile, begin + count * warp / kWarps,
                                  begin + count * (warp + 1) / kWarps, lane,
                                  totals + warp * kShareSize);
    __syncthreads();
    write_tile<kWarps, kRowsMaxRows, int(kPanel)>(task, segment, totals);
    __syncthreads();
    unit += count;
  }
}

}  // namespace

LaunchStatus launch_lowbit_gemm_rows(const LowbitGemmTask& task, void* stream) {
  return with_operands(task.args, [&]<class X, int kDigits, int kBits>() {
    constexpr int kBytes = kRingBytes<kDigits, kBits> + kWarps * kShareSize * int(sizeof(float));
    return launch("lowbit_gemm_rows", lowbit_gemm_rows<X, kDigits, kBits>,
                  dim3(unsigned(task.stripes.blocks)), kThreads, kBytes, stream, task);
  });
}

}  // namespace ow
