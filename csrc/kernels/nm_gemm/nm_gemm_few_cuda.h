// The product for up to 16 rows of x: weights stream past once.
//
// A block computes one panel. Its warps take tiles of columns in turns (split over k), each with
// the words of its next tiles on their way to shared memory that no other warp reads, and their
// sums are added in the order of the warps, so that a result depends on shapes alone.
//
// 4096 outputs are two blocks for each multiprocessor of an H100, whose memory gives one 25 bytes a
// nanosecond: with a latency of 0.7 us assumed, 18 KB must be on their way, 1.1 KB a warp.
#pragma once

#include "kernels/nm_gemm/nm_gemm_weights_cuda.h"

namespace ow {

constexpr int kNmFewWarps = 8;
constexpr int kNmFewThreads = kNmFewWarps * kWarp;

// The tiles of a panel that a warp takes, one after another: every kNmFewWarps-th from its first.
template <class T_, int kBits>
class NmSparseStream {
 public:
  using T = T_;
  using Words = NmWords<T, kBits>;
  static constexpr int kPieces = 1;
  static constexpr bool kScaled = kBits <= 8;
  static constexpr int kBlocks = 3;  // of a multiprocessor
  static constexpr int kValueBytes = int(kNmUnit * kNmPanel) * kBits / 8;
  static constexpr int kIndexBytes = 128;  // where V is 1
  static constexpr int kStageBytes = kValueBytes + kIndexBytes + (kScaled ? kNmScaleBytes : 0);
  // One is multiplied; the others are 2.3, 1.9 and 1.9 KB on their way.
  static constexpr int kStages = kBits == 16 ? 3 : kBits == 8 ? 4 : 6;
  static constexpr int kSharedBytes = kNmFewWarps * kStages * kStageBytes;
  using Step = NmSparse<T>;

  OW_DEVICE NmSparseStream(const NmGemmArgs& a, int64_t panel, int lane)
      : lane_(lane),
        panel_(panel),
        values_(nm_unit_values(a, panel, 0)),
        index_(nm_unit_index(a, panel, 0)) {
    ring_ = dynamic_shared() + int(threadIdx.x) / kWarp * kStages * kStageBytes;
    index_bytes_ = int(nm_unit_index_bytes(4, a.vector));
  }

  OW_DEVICE void begin(const NmGemmArgs& a, int tile, int tiles) {
    OW_NO_UNROLL
    for (int s = 0; s < kStages - 1; ++s) request(a, s, tile + s * kNmFewWarps, tiles);
  }
  OW_DEVICE void take(const NmGemmArgs& a, int tile, int tiles) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncwarp();  // the tile is there, and the one before is read
    request(a, stage_ == 0 ? kStages - 1 : stage_ - 1, tile + (kStages - 1) * kNmFewWarps, tiles);
    staged_ = ring_ + stage_ * kStageBytes;
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    NmKept kept;
    kept.load(staged_ + kValueBytes, a.vector, lane_);
    metadata_ = kept.metadata(lane_);
  }
  OW_DEVICE void load(int step, Step& to) const {
    Words words;
    words.load(staged_, step, lane_);
    words.decode(lane_, to.a);
    to.metadata = metadata_;
  }
  OW_DEVICE void scales(const NmGemmArgs& a, int, int step, float (&scales)[2]) const {
    staged_scales(a, staged_ + kValueBytes + kIndexBytes, step, lane_, scales);
  }

 private:
  // Starts copies of a tile, if there is one.
  OW_DEVICE void request(const NmGemmArgs& a, int stage, int tile, int tiles) {
    if (tile < tiles) {
      uint8_t* to = ring_ + stage * kStageBytes;
      const uint8_t* values = values_ + int64_t(tile) * kValueBytes;
      OW_UNROLL
      for (int i = 0; i < kValueBytes; i += kWarp * 16) {
        const int at = i + lane_ * 16;
        if (at < kValueBytes) ptx::cp_async_cg_16(to + nm_swizzled(at), values + at, 16);
      }
      if (lane_ * 4 < index_bytes_) {
        ptx::cp_async_ca_4(to + kValueBytes + lane_ * 4,
                           index_ + int64_t(tile) * index_bytes_ + lane_ * 4, 4);
      }
      if (kScaled) stage_scales(a, panel_, tile, lane_, to + kValueBytes + kIndexBytes);
    }
    ptx::cp_async_commit_group();
  }

  int lane_, index_bytes_;
  int64_t panel_;
  const uint8_t* values_;
  const uint8_t* index_;
  uint8_t* ring_;
  const uint8_t* staged_ = nullptr;
  int stage_ = 0;
  uint32_t metadata_ = 0;
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

  OW_DEVICE NmDenseStream(const NmGemmArgs&, int64_t panel, int lane)
      : lane_(lane),
        panel_(panel),
        rows_(reinterpret_cast<T*>(dynamic_shared()) + int(threadIdx.x) / kWarp * kElements) {}

  OW_DEVICE void begin(const NmGemmArgs&, int, int) {}
  OW_DEVICE void take(const NmGemmArgs& a, int tile, int) {
    __syncwarp();  // the tile before is read
    expand_tile<T, kPieces, 1>(a, panel_, tile * kNmTile, rows_, lane_, kWarp,
                               [] { __syncwarp(); });
  }
  OW_DEVICE void load(int step, Step& to) const {
    load_dense(to, rows_, int(kNmPanel) * kNmRow, step, lane_);
  }
  // Of the group of a step, which is step `step` of its tile.
  OW_DEVICE void scales(const NmGemmArgs& a, int group, int, float (&scales)[2]) const {
    load_scales(a, panel_, group, lane_, scales);
  }

 private:
  int lane_;
  int64_t panel_;
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

// The B of both steps of a tile for all tokens.
struct NmTokens {
  uint32_t b[2][kNmFewRows / 8][4];

  OW_DEVICE void load(const NmRows& x, int64_t m, int column, int lane) {
    OW_UNROLL
    for (int step = 0; step < 2; ++step) {
      OW_UNROLL
      for (int eight = 0; eight < kNmFewRows / 8; ++eight) {
        if (eight * 8 >= m) continue;
        load_tokens(b[step][eight], x, m, 0, eight * 8, column + step * kNmStep, lane);
      }
    }
  }
};

// Adds the sums of all warps, and stores the panel.
OW_DEVICE void store_panel(const NmGemmArgs& a, const float (&sums)[kNmFewRows / 8][4],
                           int64_t panel) {
  // Rows of four more, so that lanes that write at once meet no bank twice.
  __shared__ float of_warps[kNmFewWarps][kNmFewRows][kNmPanel + 4];
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
  const int warp = int(threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t panel = blockIdx.x;
  const int tiles = int(div_up(a.k, kNmTile));
  Stream weights(a, panel, lane);
  float d[kNmFewRows / 8][4] = {};
  float total[kNmFewRows / 8][4] = {};
  weights.begin(a, warp, tiles);
  for (int tile = warp; tile < tiles; tile += kNmFewWarps) {
    // Where x is in one piece it is on its way while weights are waited for.
    NmTokens tokens;
    if constexpr (kXPieces == 1) tokens.load(x, a.m, tile * kNmTile, lane);
    weights.take(a, tile, tiles);
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
          uint32_t(&b)[4] = tokens.b[step][eight];
          if constexpr (kXPieces != 1) load_tokens(b, x, a.m, x_piece, eight * 8, column, lane);
          OW_UNROLL
          for (int piece = 0; piece < Stream::kPieces; ++piece) {
            if (nm_counts(x_piece, piece)) multiply(d[eight], w, piece, step, b);
          }
        }
      }
      if (Stream::kScaled && (column + kNmStep) % span == 0) {
        float scales[2];
        weights.scales(a, column / int(a.group_size), step, scales);
        for (int eight = 0; eight < kNmFewRows / 8; ++eight) fold(d[eight], total[eight], scales);
      }
    }
  }
  store_panel(a, Stream::kScaled ? total : d, panel);
}

}  // namespace ow
