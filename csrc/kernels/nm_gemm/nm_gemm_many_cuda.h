// The product for many rows of x: tiles of x, and of a 2:4 weight, come to shared memory some
// stages ahead of the tensor cores.
//
// A block computes 128 outputs of 128, 64 or 32 tokens. Its 8 warps are 4 along the outputs, with 2
// panels each, by 2 along the tokens. With 64 tokens a warp reads 5 KB of shared memory for 16
// mma.sp of 2:4, about as long as an A100 takes to multiply them.
#pragma once

#include "kernels/nm_gemm/nm_gemm_weights_cuda.h"

namespace ow {

constexpr int kNmManyThreads = 256;
constexpr int kNmWarpPanels = 2;
constexpr int kNmWarpRows = 4;
constexpr int kNmPanels = kNmWarpPanels * kNmWarpRows;
// What a block may have on every GPU since sm_80 (sm_86, 89 and 120 have the least).
constexpr int kNmMostShared = 99 * 1024;

// 2:4: stages hold packed units.
template <class T_, int kBits>
class NmSparseTiles {
 public:
  using T = T_;
  using Words = NmWords<T, kBits>;
  static constexpr int kPieces = Words::kPieces;
  static constexpr bool kScaled = kBits <= 8;
  static constexpr int kUnitBytes = int(kNmUnit * kNmPanel) * kBits / 8;
  static constexpr int kStageBytes = kNmPanels * kUnitBytes;
  static constexpr int kExpandedBytes = 0;
  using Step = NmSparse<T, kPieces>;

  // For the two panels from `panel` on, of the block's from `first` on.
  OW_DEVICE NmSparseTiles(const NmGemmArgs& a, int64_t first, int64_t panel, uint8_t*)
      : first_(first),
        panel_(panel),
        panels_(div_up(a.n, kNmPanel)),
        thread_(int(threadIdx.x)),
        lane_(thread_ % kWarp) {}

  // Starts copies of a tile, all threads together.
  OW_DEVICE void stage(const NmGemmArgs& a, int tile, uint8_t* to) const {
    constexpr int kChunk = 16;
    constexpr int kChunks = kUnitBytes / kChunk;
    OW_UNROLL
    for (int i = thread_; i < kNmPanels * kChunks; i += kNmManyThreads) {
      const int64_t panel = first_ + i / kChunks;
      const bool inside = panel < panels_;
      const int at = i % kChunks * kChunk;
      const int swizzled = at ^ at / 128 % 2 * 32;  // as NmWords reads them
      ptx::cp_async_cg_16(to + i / kChunks * kUnitBytes + swizzled,
                          nm_unit_values(a, inside ? panel : first_, tile) + at,
                          inside ? kChunk : 0);
    }
  }
  // An index is read a tile ahead, to registers: its units are too short for copies of 16 bytes.
  OW_DEVICE void request(const NmGemmArgs& a, int tile) {
    OW_UNROLL
    for (int i = 0; i < kNmWarpPanels; ++i) {
      if (panel_ + i >= panels_) {
        next_[i].index[0] = next_[i].index[1] = 0;
      } else {
        next_[i].load(nm_unit_index(a, panel_ + i, tile), a.vector, lane_);
      }
    }
  }
  OW_DEVICE void take(const NmGemmArgs&, int, const uint8_t* staged) {
    staged_ = staged + (panel_ - first_) * kUnitBytes;
    OW_UNROLL
    for (int i = 0; i < kNmWarpPanels; ++i) metadata_[i] = next_[i].metadata(lane_);
  }
  OW_DEVICE void load(int i, int step, Step& to) const {
    Words words;
    words.load(staged_ + i * kUnitBytes, step, lane_, true);
    words.decode(lane_, to);
    to.metadata = metadata_[i];
  }

 private:
  int64_t first_, panel_, panels_;
  int thread_, lane_;
  const uint8_t* staged_ = nullptr;
  uint32_t metadata_[kNmWarpPanels];
  NmKept next_[kNmWarpPanels];
};

// Any pattern: a tile is made dense when it is its turn.
template <class T_, int kPieces_>
class NmDenseTiles {
 public:
  using T = T_;
  static constexpr int kPieces = kPieces_;
  static constexpr bool kScaled = true;
  static constexpr int kOutputs = kNmPanels * int(kNmPanel);
  static constexpr int kStageBytes = 0;
  static constexpr int kExpandedBytes = kPieces * kOutputs * kNmRow * 2;
  using Step = NmDense<T, kPieces>;

  OW_DEVICE NmDenseTiles(const NmGemmArgs&, int64_t first, int64_t panel, uint8_t* expanded)
      : first_(first),
        rows_(reinterpret_cast<T*>(expanded)),
        own_rows_(rows_ + (panel - first) * kNmPanel * kNmRow) {}

  OW_DEVICE void stage(const NmGemmArgs&, int, uint8_t*) const {}
  OW_DEVICE void request(const NmGemmArgs&, int) {}
  OW_DEVICE void take(const NmGemmArgs& a, int tile, const uint8_t*) {
    expand_tile<T, kPieces>(a, first_, kNmPanels, tile * kNmTile, rows_, int(threadIdx.x),
                            kNmManyThreads, [] { __syncthreads(); });
  }
  OW_DEVICE void load(int i, int step, Step& to) const {
    load_dense(to, own_rows_ + i * int(kNmPanel) * kNmRow, kOutputs * kNmRow, step,
               int(threadIdx.x) % kWarp);
  }

 private:
  int64_t first_;
  T *rows_, *own_rows_;
};

// How large a block's tile is.
template <class Tiles, int kXPieces>
struct NmManyShape {
  static constexpr int kTokens = kXPieces == 1 ? 128 : Tiles::kPieces == 1 ? 64 : 32;
  static constexpr int kStages = kXPieces * Tiles::kPieces == 1 ? 3 : 2;
  static constexpr int kRowsBytes = kXPieces * kTokens * kNmRow * 2;
  static constexpr int kStageBytes = kRowsBytes + Tiles::kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + Tiles::kExpandedBytes;
  static_assert(kSharedBytes <= kNmMostShared);
};

// Starts copies of x [kXPieces][kTokens][kNmRow] from `column` on; zero past m and x.columns.
template <int kXPieces, int kTokens>
OW_DEVICE void stage_rows(const NmRows& x, int64_t m, int64_t first, int column, uint8_t* to) {
  constexpr int kChunk = 8;
  constexpr int kChunks = kNmTile / kChunk;
  OW_UNROLL
  for (int i = int(threadIdx.x); i < kXPieces * kTokens * kChunks; i += kNmManyThreads) {
    const int row = i / kChunks;
    const int64_t token = first + row % kTokens;
    const int at = column + i % kChunks * kChunk;
    const bool inside = token < m && at < x.columns;
    const int64_t from = row / kTokens * x.piece + token * x.stride + at;
    ptx::cp_async_cg_16(to + (row * kNmRow + i % kChunks * kChunk) * 2,
                        static_cast<const uint16_t*>(x.x) + (inside ? from : 0), inside ? 16 : 0);
  }
}

// A group's sum is scaled every `span` columns, and at the end.
template <class Tiles, int kXPieces>
__global__ void __launch_bounds__(kNmManyThreads, 1) nm_many(NmGemmArgs a, NmRows x, int32_t span) {
  using Shape = NmManyShape<Tiles, kXPieces>;
  using T = typename Tiles::T;
  constexpr int kEights = Shape::kTokens / 2 / 8;  // of tokens, a warp
  uint8_t* shared = dynamic_shared();
  const int warp = int(threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  // Blocks that run at the same time share outputs: x is the smaller, and stays in L2.
  const int64_t token_tiles = div_up(a.m, Shape::kTokens);
  const int64_t token0 = blockIdx.x % token_tiles * Shape::kTokens;
  const int64_t first_panel = blockIdx.x / token_tiles * kNmPanels;
  const int64_t panel = first_panel + warp % kNmWarpRows * kNmWarpPanels;
  const int warp_token = warp / kNmWarpRows * kEights * 8;
  const bool idle = panel * kNmPanel >= a.n || token0 + warp_token >= a.m;
  const int tiles = int(div_up(a.k, kNmTile));
  Tiles weights(a, first_panel, panel, shared + Shape::kStages * Shape::kStageBytes);
  float d[kNmWarpPanels][kEights][4] = {};
  float total[kNmWarpPanels][kEights][4] = {};

  const auto stage = [&](int tile) {
    uint8_t* to = shared + tile % Shape::kStages * Shape::kStageBytes;
    stage_rows<kXPieces, Shape::kTokens>(x, a.m, token0, tile * kNmTile, to);
    weights.stage(a, tile, to + Shape::kRowsBytes);
  };
  const auto fold_all = [&](int column) {
    OW_UNROLL
    for (int i = 0; i < kNmWarpPanels; ++i) {
      if ((panel + i) * kNmPanel >= a.n) continue;
      float scales[2];
      load_scales(a, panel + i, column, lane, scales);
      OW_UNROLL
      for (int eight = 0; eight < kEights; ++eight) fold(d[i][eight], total[i][eight], scales);
    }
  };

  for (int tile = 0; tile < Shape::kStages - 1; ++tile) {
    if (tile < tiles) stage(tile);
    ptx::cp_async_commit_group();
  }
  weights.request(a, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait_group<Shape::kStages - 2>();
    __syncthreads();  // the tile is there, and the one before is read
    if (tile + Shape::kStages - 1 < tiles) stage(tile + Shape::kStages - 1);
    ptx::cp_async_commit_group();
    const uint8_t* staged = shared + tile % Shape::kStages * Shape::kStageBytes;
    weights.take(a, tile, staged + Shape::kRowsBytes);
    if (tile + 1 < tiles) weights.request(a, tile + 1);
    if (idle) continue;
    OW_UNROLL
    for (int step = 0; step < 2; ++step) {
      typename Tiles::Step w[kNmWarpPanels];
      OW_UNROLL
      for (int i = 0; i < kNmWarpPanels; ++i) weights.load(i, step, w[i]);
      OW_UNROLL
      for (int eight = 0; eight < kEights; ++eight) {
        if (token0 + warp_token + eight * 8 >= a.m) continue;
        OW_UNROLL
        for (int x_piece = 0; x_piece < kXPieces; ++x_piece) {
          // Row lane % 8 of the matrix of columns 8 (lane / 8) on.
          const int row = x_piece * Shape::kTokens + warp_token + eight * 8 + lane % 8;
          uint32_t b[4];
          ptx::ldmatrix_x4(
              b, reinterpret_cast<const T*>(staged) + row * kNmRow + step * kNmStep + lane / 8 * 8);
          OW_UNROLL
          for (int i = 0; i < kNmWarpPanels; ++i) {
            OW_UNROLL
            for (int piece = 0; piece < Tiles::kPieces; ++piece) {
              if (nm_counts(x_piece, piece)) multiply(d[i][eight], w[i], piece, step, b);
            }
          }
        }
      }
      const int end = tile * kNmTile + (step + 1) * kNmStep;
      if (Tiles::kScaled && end % span == 0) {
        fold_all(end - 1);
      }
    }
  }
  if (idle) return;
  if (Tiles::kScaled && tiles * kNmTile % span != 0) fold_all(int(a.k) - 1);
  OW_UNROLL
  for (int i = 0; i < kNmWarpPanels; ++i) {
    OW_UNROLL
    for (int eight = 0; eight < kEights; ++eight) {
      OW_UNROLL
      for (int j = 0; j < 4; ++j) {
        const fragments::Element e = fragments::d_m16n8(lane, j);
        store_result(a, token0 + warp_token + eight * 8 + e.column, (panel + i) * kNmPanel + e.row,
                     (Tiles::kScaled ? total : d)[i][eight][j]);
      }
    }
  }
}

}  // namespace ow
