// Many rows, groups of 32 and more: a block computes 128 outputs of 16 or 64 rows. Each of its four
// warps has a panel; they share x. 64 k at a time come through a pipeline of asynchronous copies:
// rows of x to be shared, and for each thread the pieces of the weight that it alone reads.
#include "cuda/device.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "kernels/lowbit_gemm/lowbit_gemm_panel_cuda.h"

namespace ow {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kOutputs = kWarps * int(kPanel);
constexpr int kStages = 4;  // three on their way
constexpr int kStepBlocks = kTileShape64.step_blocks;
constexpr int kStepK = kStepBlocks * kBlockK;

template <class X, int kBits, int kTiles>
class Pipeline {
 public:
  static constexpr int kRowPieces = kStepK * int(sizeof(X)) / kPieceBytes;
  static constexpr int kXBytes = kTiles * kRowTile * kRowPieces * kPieceBytes;
  static constexpr int kWBytes = kStepBlocks * kPieces<kBits> * kThreads * kPieceBytes;
  static constexpr int kBytes = kStages * (kXBytes + kWBytes);

  OW_DEVICE Pipeline(const LowbitGemmArgs& args, int64_t panel, int lane)
      : args_(args), lane_(lane), blocks_(int(args.k_padded / kBlockK)) {
    w_ = args.w + panel * (int64_t(blocks_) * kSpanBytes<kBits>);
    shared_ = dynamic_shared();
  }

  template <int kDigits>
  OW_DEVICE void copy(int stage, int64_t row0, int step) {
    // Not unrolled, as the addresses of all rows would be kept in registers that sums need.
    OW_NO_UNROLL
    for (int p = int(threadIdx.x); p < kTiles * kRowTile * kRowPieces; p += kThreads) {
      const int row = p / kRowPieces;
      const int piece = p % kRowPieces;
      const int k = step * kStepK + piece * kPieceBytes / int(sizeof(X));
      if (k >= args_.k_padded) continue;
      const int64_t from = x_row<kDigits>(args_, row0, row) * args_.x_blocks.k_padded + k;
      ptx::cp_async_cg_16(x_piece(stage, row, piece), static_cast<const X*>(args_.x) + from,
                          kPieceBytes);
    }
    OW_UNROLL
    for (int b = 0; b < kStepBlocks; ++b) {
      const int block = step * kStepBlocks + b;
      if (block >= blocks_) break;
      OW_UNROLL
      for (int p = 0; p < kPieces<kBits>; ++p) {
        ptx::cp_async_cg_16(w_piece(stage, b, p),
                            w_ + int64_t(block) * kSpanBytes<kBits> + piece_at<kBits>(lane_, p),
                            kPieceBytes);
      }
    }
  }

  OW_DEVICE void pieces(int stage, int b, uint4 (&pieces)[kPieces<kBits>]) const {
    OW_UNROLL
    for (int p = 0; p < kPieces<kBits>; ++p) {
      pieces[p] = *reinterpret_cast<const uint4*>(w_piece(stage, b, p));
    }
  }

  OW_DEVICE void read_x(int stage, int b, int j, uint32_t (&words)[2 * sizeof(X)]) const {
    const int at = 8 * int(sizeof(X)) * (lane_ % 4);  // of the 32 k of block b
    const int row = j * kRowTile + lane_ / 4;
    const uint8_t* piece = x_piece(stage, row, b * kRowPieces / kStepBlocks + at / kPieceBytes);
    if constexpr (sizeof(X) == 2) {
      const uint4 eight = *reinterpret_cast<const uint4*>(piece);
      words[0] = eight.x;
      words[1] = eight.y;
      words[2] = eight.z;
      words[3] = eight.w;
    } else {
      const uint2 eight = *reinterpret_cast<const uint2*>(piece + at % kPieceBytes);
      words[0] = eight.x;
      words[1] = eight.y;
    }
  }

 private:
  // Pieces of a row change places so that rows that are read at once meet no bank twice: two rows
  // of 128 bytes in a quarter of a warp, four of 64 bytes in a half.
  OW_DEVICE uint8_t* x_piece(int stage, int row, int piece) const {
    const int turned = piece ^ (sizeof(X) == 2 ? (row & 1) << 2 : row & 2);
    return shared_ + stage * kXBytes + (row * kRowPieces + turned) * kPieceBytes;
  }
  OW_DEVICE uint8_t* w_piece(int stage, int b, int p) const {
    const int at = (stage * kStepBlocks + b) * kPieces<kBits> + p;
    return shared_ + kStages * kXBytes + (at * kThreads + int(threadIdx.x)) * kPieceBytes;
  }

  const LowbitGemmArgs& args_;
  int lane_, blocks_;
  const uint8_t* w_;
  uint8_t* shared_;
};

// Sums a segment into totals [rows][kTotalsRow], which take the place of the stages.
template <class X, int kDigits, int kBits, int kTiles>
OW_DEVICE void sum_segment(const LowbitGemmArgs& args, const Segment& segment, int64_t row0,
                           int64_t panel0, float* totals) {
  using Sum = PanelSum<X, kDigits, kBits, kTiles, false>;
  const int warp = int(threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  // Past the last panel, that one again; what comes of it is not written.
  const int64_t panel = min_of(panel0 + warp, div_up(args.n, kPanel) - 1);
  const int first = int(segment.begin);
  const int last = int(segment.end);
  const int blocks = int(args.k_padded / kBlockK);
  Pipeline<X, kBits, kTiles> pipeline(args, panel, lane);
  OW_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    if (first + s < last) pipeline.template copy<kDigits>(s, row0, first + s);
    ptx::cp_async_commit_group();
  }
  Sum sum(args, panel, first * kStepBlocks, row0, lane);
  int stage = 0;
  for (int step = first; step < last; ++step) {
    ptx::cp_async_wait_group<kStages - 2>();
    // The step is there for all, and the stage before it is read by none.
    __syncthreads();
    const int ahead = step + kStages - 1;
    if (ahead < last) pipeline.template copy<kDigits>((stage + kStages - 1) % kStages, row0, ahead);
    ptx::cp_async_commit_group();
    // Not unrolled either: one block of 64 rows takes all registers.
    OW_NO_UNROLL
    for (int b = 0; b < kStepBlocks; ++b) {
      const int block = step * kStepBlocks + b;
      if (block >= blocks) break;
      uint4 pieces[kPieces<kBits>];
      pipeline.pieces(stage, b, pieces);
      const bool ends = block + 1 == blocks || block + 1 == last * kStepBlocks;
      sum.add(block, pieces, ends,
              [&](int j, bool, auto& words) { pipeline.read_x(stage, b, j, words); });
    }
    stage = (stage + 1) % kStages;
  }
  __syncthreads();
  sum.template store<kOutputs>(totals + warp * int(kPanel));
}

template <int kDigits, int kTiles>
constexpr LowbitGemmShape kShape = kDigits == 3                             ? kDigitShape16
                                   : kTiles * kRowTile == kTileShape64.rows ? kTileShape64
                                                                            : kTileShape16;

// The stages, and totals in their place.
template <class X, int kDigits, int kBits, int kTiles>
constexpr int shared_bytes() {
  constexpr int kStaged = Pipeline<X, kBits, kTiles>::kBytes;
  constexpr int kTotals = kShape<kDigits, kTiles>.rows * kTotalsRow<kOutputs> * int(sizeof(float));
  return kStaged > kTotals ? kStaged : kTotals;
}

template <class X, int kDigits, int kBits, int kTiles>
__global__ void __launch_bounds__(kThreads, (kShape<kDigits, kTiles>.blocks))
    lowbit_gemm_tile(const LowbitGemmTask task) {
  constexpr int kRows = kShape<kDigits, kTiles>.rows;
  float* totals = reinterpret_cast<float*>(dynamic_shared());
  const Stripes& stripes = task.stripes;
  const int64_t end = first_unit(stripes, blockIdx.x + 1);
  for (int64_t unit = first_unit(stripes, blockIdx.x); unit < end;) {
    const Segment segment = segment_at(stripes, blockIdx.x, unit);
    sum_segment<X, kDigits, kBits, kTiles>(task.args, segment,
                                           segment.tile % task.row_tiles * kRows,
                                           segment.tile / task.row_tiles * kWarps, totals);
    __syncthreads();
    write_tile<1, kRows, kOutputs>(task, segment, totals);
    __syncthreads();
    unit += segment.end - segment.begin;
  }
}

template <class X, int kDigits, int kBits, int kTiles>
LaunchStatus launch_tiles(const LowbitGemmTask& task, void* stream) {
  return launch("lowbit_gemm_tile", lowbit_gemm_tile<X, kDigits, kBits, kTiles>,
                dim3(unsigned(task.stripes.blocks)), kThreads,
                shared_bytes<X, kDigits, kBits, kTiles>(), stream, task);
}

}  // namespace

LaunchStatus launch_lowbit_gemm_tile(const LowbitGemmTask& task, int rows, void* stream) {
  return with_operands(task.args, [&]<class X, int kDigits, int kBits>() {
    if constexpr (kDigits == 1) {
      if (rows == kTileShape64.rows) return launch_tiles<X, 1, kBits, 8>(task, stream);
    }
    return launch_tiles<X, kDigits, kBits, 2 * kDigits>(task, stream);
  });
}

}  // namespace ow
