// The product for up to 16 rows of x: weights stream past once, from global memory to registers.
//
// A block computes one panel. Its warps take tiles of columns in turns (split over k), each with
// the words of its next tile on their way, and their sums are added in the order of the warps, so
// that a result depends on shapes alone. Three blocks of 8 warps fit a multiprocessor, each warp
// with a tile on its way: 27 KB of bf16, 9 KB of int4. An A100 at 2 TB/s, with a latency of 0.5 us
// assumed, needs 10 KB.
#pragma once

#include "kernels/nm_gemm/nm_gemm_weights_cuda.h"

namespace ow {

constexpr int kNmFewWarps = 8;
constexpr int kNmFewThreads = kNmFewWarps * kWarp;

// The tiles of a panel that a warp takes, one after another.
template <class T_, int kBits>
class NmSparseStream {
 public:
  using T = T_;
  using Words = NmWords<T, kBits>;
  static constexpr int kPieces = 1;
  static constexpr bool kScaled = kBits <= 8;
  static constexpr int kBlocks = 3;  // of a multiprocessor
  static constexpr int kSharedBytes = 0;
  using Step = NmSparse<T>;

  OW_DEVICE NmSparseStream(T*, int lane) : lane_(lane) {}

  OW_DEVICE void request(const NmGemmArgs& a, int64_t panel, int tile) {
    const uint8_t* unit = nm_unit_values(a, panel, tile);
    OW_UNROLL
    for (int step = 0; step < 2; ++step) next_[step].load(unit, step, lane_, false);
    next_kept_.load(nm_unit_index(a, panel, tile), a.vector, lane_);
  }
  OW_DEVICE void take(const NmGemmArgs&, int64_t, int) {
    OW_UNROLL
    for (int step = 0; step < 2; ++step) words_[step] = next_[step];
    metadata_ = next_kept_.metadata(lane_);
  }
  OW_DEVICE void load(int step, Step& to) const {
    words_[step].decode(lane_, to.a);
    to.metadata = metadata_;
  }

 private:
  int lane_;
  Words words_[2], next_[2];  // of each step
  uint32_t metadata_;         // of both
  NmKept next_kept_;
};

template <class T_, int kPieces_>
class NmDenseStream {
 public:
  using T = T_;
  static constexpr int kPieces = kPieces_;
  static constexpr bool kScaled = true;
  static constexpr int kBlocks = 2;                                   // pieces take registers
  static constexpr int kElements = kPieces * int(kNmPanel) * kNmRow;  // of shared memory, a warp
  static constexpr int kSharedBytes = kNmFewWarps * kElements * 2;
  using Step = NmDense<T, kPieces>;

  OW_DEVICE NmDenseStream(T* shared, int lane)
      : lane_(lane), rows_(shared + int(threadIdx.x) / kWarp * kElements) {}

  OW_DEVICE void request(const NmGemmArgs&, int64_t, int) {}
  OW_DEVICE void take(const NmGemmArgs& a, int64_t panel, int tile) {
    __syncwarp();  // the tile before is read
    expand_tile<T, kPieces>(a, panel, 1, tile * kNmTile, rows_, lane_, kWarp, [] { __syncwarp(); });
  }
  OW_DEVICE void load(int step, Step& to) const {
    load_dense(to, rows_, int(kNmPanel) * kNmRow, step, lane_);
  }

 private:
  int lane_;
  T* rows_;
};

// The B of a step for 8 tokens, from global memory.
OW_DEVICE void load_tokens(uint32_t (&b)[4], const NmRows& x, int64_t m, int piece, int first,
                           int column, int lane) {
  OW_UNROLL
  for (int i = 0; i < 4; ++i) {
    const fragments::Element e = fragments::b_sp_m16n8k32(lane, 2 * i);
    const int64_t token = first + e.column;
    const int at = column + e.row;
    b[i] = 0;
    if (token < m && at < x.columns) {
      const uint16_t* row = static_cast<const uint16_t*>(x.x) + piece * x.piece + token * x.stride;
      b[i] = *reinterpret_cast<const uint32_t*>(row + at);
    }
  }
}

// Adds the sums of all warps, and stores the panel.
OW_DEVICE void store_panel(const NmGemmArgs& a, const float (&sums)[kNmFewRows / 8][4],
                           int64_t panel) {
  __shared__ float of_warps[kNmFewWarps][kNmFewRows][kNmPanel];
  const int thread = int(threadIdx.x);
  const int lane = thread % kWarp;
  OW_UNROLL
  for (int eight = 0; eight < kNmFewRows / 8; ++eight) {
    OW_UNROLL
    for (int i = 0; i < 4; ++i) {
      const fragments::Element e = fragments::d_m16n8(lane, i);
      of_warps[thread / kWarp][eight * 8 + e.column][e.row] = sums[eight][i];
    }
  }
  __syncthreads();  // of_warps is written
  const int token = thread / int(kNmPanel);
  const int output = thread % int(kNmPanel);
  float sum = 0.0f;
  for (int warp = 0; warp < kNmFewWarps; ++warp) sum += of_warps[warp][token][output];
  store_result(a, token, panel * kNmPanel + output, sum);
}

// A group's sum is scaled every `span` columns: the smaller of its size and a tile's.
template <class Stream, int kXPieces>
__global__ void __launch_bounds__(kNmFewThreads, Stream::kBlocks)
    nm_few(NmGemmArgs a, NmRows x, int32_t span) {
  using T = typename Stream::T;
  const int warp = int(threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t panel = blockIdx.x;
  const int tiles = int(div_up(a.k, kNmTile));
  Stream weights(reinterpret_cast<T*>(dynamic_shared()), lane);
  float d[kNmFewRows / 8][4] = {};
  float total[kNmFewRows / 8][4] = {};
  if (warp < tiles) weights.request(a, panel, warp);
  for (int tile = warp; tile < tiles; tile += kNmFewWarps) {
    weights.take(a, panel, tile);
    if (tile + kNmFewWarps < tiles) weights.request(a, panel, tile + kNmFewWarps);
    OW_UNROLL
    for (int step = 0; step < 2; ++step) {
      const int column = tile * kNmTile + step * kNmStep;
      typename Stream::Step w;
      weights.load(step, w);
      OW_UNROLL
      for (int eight = 0; eight < kNmFewRows / 8; ++eight) {
        if (eight * 8 >= a.m) continue;
        OW_UNROLL
        for (int x_piece = 0; x_piece < kXPieces; ++x_piece) {
          uint32_t b[4];
          load_tokens(b, x, a.m, x_piece, eight * 8, column, lane);
          OW_UNROLL
          for (int piece = 0; piece < Stream::kPieces; ++piece) {
            if (nm_counts(x_piece, piece)) multiply(d[eight], w, piece, step, b);
          }
        }
      }
      if (Stream::kScaled && (column + kNmStep) % span == 0) {
        float scales[2];
        load_scales(a, panel, column / int(a.group_size), lane, scales);
        for (int eight = 0; eight < kNmFewRows / 8; ++eight) fold(d[eight], total[eight], scales);
      }
    }
  }
  store_panel(a, Stream::kScaled ? total : d, panel);
}

}  // namespace ow
