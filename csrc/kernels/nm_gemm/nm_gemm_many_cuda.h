// The product for many rows of x: tiles of x, and of a 2:4 weight, come to shared memory some
// stages ahead of the tensor cores.
//
// A block computes 128 outputs of 128, 64 or 32 tokens. Its 8 warps are 4 along the outputs, with 2
// panels each, by 2 along the tokens. For 8 tokens and a step a warp then reads 512 bytes of x for
// 2 mma.sp, as long as an A100 takes to multiply them.
#pragma once

#include "kernels/nm_gemm/nm_gemm_weights_cuda.h"

namespace ow {

constexpr int kNmManyThreads = 256;
constexpr int kNmWarpPanels = 2;
constexpr int kNmWarpRows = 4;
constexpr int kNmPanels = kNmWarpPanels * kNmWarpRows;
constexpr int kNmOutputs = kNmPanels * int(kNmPanel);
// What a block may have on every GPU since sm_80 (sm_86, 89 and 120 have the least).
constexpr int kNmMostShared = 99 * 1024;

// 2:4: stages hold packed units.
template <class T_, int kBits>
class NmSparseTiles {
 public:
  using T = T_;
  using Words = NmWords<T, kBits>;
  static constexpr int kPieces = 1;
  static constexpr bool kScaled = kBits <= 8;
  static constexpr int kValueBytes = int(kNmUnit * kNmPanel) * kBits / 8;  // of a panel
  static constexpr int kIndexBytes = 128;                                  // where V is 1
  static constexpr int kScaleBytes = kScaled ? kNmScaleBytes : 0;
  static constexpr int kStageBytes = kNmPanels * (kValueBytes + kIndexBytes + kScaleBytes);
  static constexpr int kExpandedBytes = 0;
  using Step = NmSparse<T>;

  // `own`: the first of the warp's panels, `first`: of the block's.
  OW_DEVICE NmSparseTiles(int first, int own, uint8_t*) : first_(first), own_(own - first) {}

  // Starts copies of a tile, all threads together.
  OW_DEVICE void stage(const NmGemmArgs& a, int tile, uint8_t* to) const {
    const int panels = int(div_up(a.n, kNmPanel));
    constexpr int kChunk = 16;
    constexpr int kChunks = kValueBytes / kChunk;
    OW_NO_UNROLL
    for (int i = int(threadIdx.x); i < kNmPanels * kChunks; i += kNmManyThreads) {
      const int panel = first_ + i / kChunks;
      const bool inside = panel < panels;
      const int at = i % kChunks * kChunk;
      ptx::cp_async_cg_16(to + i / kChunks * kValueBytes + nm_swizzled(at),
                          nm_unit_values(a, inside ? panel : 0, tile) + at, inside ? kChunk : 0);
    }
    // A warp a panel.
    static_assert(kNmPanels * kWarp == kNmManyThreads && kIndexBytes == kWarp * 4);
    const int panel = first_ + int(threadIdx.x) / kWarp;
    const int lane = int(threadIdx.x) % kWarp;
    const bool inside = panel < panels && lane * 4 < nm_unit_index_bytes(4, a.vector);
    ptx::cp_async_ca_4(to + kNmPanels * kValueBytes + threadIdx.x * 4,
                       nm_unit_index(a, inside ? panel : 0, tile) + (inside ? lane * 4 : 0),
                       inside ? 4 : 0);
    if (kScaled && panel < panels) {
      uint8_t* scales = to + kNmPanels * (kValueBytes + kIndexBytes);
      stage_scales(a, panel, tile, lane, scales + (panel - first_) * kScaleBytes);
    }
  }
  OW_DEVICE void take(const NmGemmArgs& a, int, const uint8_t* staged) {
    staged_ = staged + own_ * kValueBytes;
    scales_ = staged + kNmPanels * (kValueBytes + kIndexBytes) + own_ * kScaleBytes;
    const uint8_t* index = staged + kNmPanels * kValueBytes + own_ * kIndexBytes;
    const int lane = int(threadIdx.x) % kWarp;
    OW_UNROLL
    for (int i = 0; i < kNmWarpPanels; ++i) {
      NmKept kept;
      kept.load(index + i * kIndexBytes, a.vector, lane);
      metadata_[i] = kept.metadata(lane);
    }
  }
  OW_DEVICE void load(int i, int step, Step& to) const {
    const int lane = int(threadIdx.x) % kWarp;
    Words words;
    words.load(staged_ + i * kValueBytes, step, lane);
    words.decode(lane, to.a);
    to.metadata = metadata_[i];
  }
  OW_DEVICE void scales(const NmGemmArgs& a, int i, int, int step, float (&scales)[2]) const {
    staged_scales(a, scales_ + i * kScaleBytes, step, int(threadIdx.x) % kWarp, scales);
  }

 private:
  int first_, own_;
  const uint8_t* staged_ = nullptr;
  const uint8_t* scales_ = nullptr;
  uint32_t metadata_[kNmWarpPanels];
};

// Any pattern: a tile is made dense when it is its turn.
template <class T_, int kPieces_>
class NmDenseTiles {
 public:
  using T = T_;
  static constexpr int kPieces = kPieces_;
  static constexpr bool kScaled = true;
  static constexpr int kStageBytes = 0;
  static constexpr int kExpandedBytes = kPieces * kNmOutputs * kNmRow * 2;
  using Step = NmDense<T, kPieces>;

  OW_DEVICE NmDenseTiles(int first, int own, uint8_t* expanded)
      : first_(first), own_(own - first), rows_(reinterpret_cast<T*>(expanded)) {}

  OW_DEVICE void stage(const NmGemmArgs&, int, uint8_t*) const {}
  OW_DEVICE void take(const NmGemmArgs& a, int tile, const uint8_t*) const {
    expand_tile<T, kPieces, kNmPanels>(a, first_, tile * kNmTile, rows_, int(threadIdx.x),
                                       kNmManyThreads, [] { __syncthreads(); });
  }
  OW_DEVICE void load(int i, int step, Step& to) const {
    load_dense(to, rows_ + (own_ + i) * int(kNmPanel) * kNmRow, kNmOutputs * kNmRow, step,
               int(threadIdx.x) % kWarp);
  }
  // Of the group of a step, which is step `step` of its tile.
  OW_DEVICE void scales(const NmGemmArgs& a, int i, int group, int, float (&scales)[2]) const {
    load_scales(a, first_ + own_ + i, group, int(threadIdx.x) % kWarp, scales);
  }

 private:
  int first_, own_;
  T* rows_;
};

// How large a block's tile is.
template <class Tiles, int kXPieces>
struct NmManyShape {
  static constexpr bool kManyPieces = kXPieces * Tiles::kPieces > 1;
  // Totals take registers beside the sums, pieces shared memory.
  static constexpr int kTokens = kXPieces * Tiles::kPieces > 3   ? 32
                                 : kManyPieces || Tiles::kScaled ? 64
                                                                 : 128;
  static constexpr int kEights = kTokens / 2 / 8;  // of tokens, a warp
  static constexpr int kStages = kManyPieces ? 2 : 3;
  static constexpr int kRowsBytes = kXPieces * kTokens * kNmRow * 2;
  static constexpr int kStageBytes = kRowsBytes + Tiles::kStageBytes;
  static constexpr int kLoadBytes = kStages * kStageBytes + Tiles::kExpandedBytes;
  // At the end, results as fp32 [kTokens][kResultRow]: rows that lanes write at once meet no bank
  // twice.
  static constexpr int kResultRow = kNmOutputs + 4;
  static constexpr int kResultBytes = kTokens * kResultRow * 4;
  static constexpr int kSharedBytes = kLoadBytes > kResultBytes ? kLoadBytes : kResultBytes;
  static_assert(kSharedBytes <= kNmMostShared);
  // Of a multiprocessor: two leave a thread 128 registers.
  static constexpr int kBlocks = Tiles::kPieces > 1 ? 1 : 2;
};

// Starts copies of x [kXPieces][kTokens][kNmRow] from `column` on; zero past m and x.columns. A
// thread copies the same 8 columns of several rows.
template <int kXPieces, int kTokens>
OW_DEVICE void stage_rows(const NmRows& x, int64_t m, int64_t first, int column, uint8_t* to) {
  constexpr int kChunk = 8;
  constexpr int kTogether = kNmManyThreads / (kNmTile / kChunk);  // rows
  const int thread = int(threadIdx.x);
  const int own_row = thread / (kNmTile / kChunk);
  const int own_column = thread % (kNmTile / kChunk) * kChunk;
  const uint16_t* from =
      static_cast<const uint16_t*>(x.x) + (first + own_row) * x.stride + column + own_column;
  OW_NO_UNROLL
  for (int row = 0; row < kXPieces * kTokens; row += kTogether) {
    const int token = row % kTokens;
    const bool inside = first + token + own_row < m && column + own_column < x.columns;
    const uint16_t* at = from + row / kTokens * x.piece + token * x.stride;
    ptx::cp_async_cg_16(to + ((row + own_row) * kNmRow + own_column) * 2, inside ? at : x.x,
                        inside ? 16 : 0);
  }
}

// The sums of a warp: two panels by kTokens / 2 tokens.
template <class Tiles, int kXPieces>
struct NmManySums {
  using Shape = NmManyShape<Tiles, kXPieces>;
  float d[kNmWarpPanels][Shape::kEights][4] = {};
  float total[kNmWarpPanels][Shape::kEights][4] = {};

  // Adds one step, for `tokens` tokens whose rows begin at x.
  OW_DEVICE void add(const Tiles& weights, const typename Tiles::T* x, int tokens, int step,
                     int lane) {
    typename Tiles::Step w[kNmWarpPanels];
    OW_UNROLL
    for (int i = 0; i < kNmWarpPanels; ++i) weights.load(i, step, w[i]);
    OW_UNROLL
    for (int eight = 0; eight < Shape::kEights; ++eight) {
      if (eight * 8 >= tokens) continue;
      OW_UNROLL
      for (int x_piece = 0; x_piece < kXPieces; ++x_piece) {
        // Row lane % 8 of the matrix of columns 8 (lane / 8) on.
        const int row = x_piece * Shape::kTokens + eight * 8 + lane % 8;
        uint32_t b[4];
        ptx::ldmatrix_x4(b, x + row * kNmRow + step * kNmStep + lane / 8 * 8);
        OW_UNROLL
        for (int i = 0; i < kNmWarpPanels; ++i) {
          OW_UNROLL
          for (int piece = 0; piece < Tiles::kPieces; ++piece) {
            if (nm_counts(x_piece, piece)) multiply(d[i][eight], w[i], piece, step, b);
          }
        }
      }
    }
  }

  // Scales what was summed of group g, which ends with a step.
  OW_DEVICE void fold_group(const NmGemmArgs& a, const Tiles& weights, int panel, int g, int step) {
    OW_UNROLL
    for (int i = 0; i < kNmWarpPanels; ++i) {
      if ((panel + i) * kNmPanel >= a.n) continue;
      float scales[2];
      weights.scales(a, i, g, step, scales);
      OW_UNROLL
      for (int eight = 0; eight < Shape::kEights; ++eight) {
        fold(d[i][eight], total[i][eight], scales);
      }
    }
  }

  // To rows of tokens, at the first of the warp's outputs and tokens.
  OW_DEVICE void store(float* results, int lane) const {
    OW_UNROLL
    for (int i = 0; i < kNmWarpPanels; ++i) {
      OW_UNROLL
      for (int eight = 0; eight < Shape::kEights; ++eight) {
        OW_UNROLL
        for (int j = 0; j < 4; ++j) {
          const fragments::Element e = fragments::d_m16n8(lane, j);
          const int at = (eight * 8 + e.column) * Shape::kResultRow + i * int(kNmPanel) + e.row;
          results[at] = (Tiles::kScaled ? total : d)[i][eight][j];
        }
      }
    }
  }
};

// A block's tile of the result, counted in tiles.
struct NmResultTile {
  unsigned tokens, outputs;
};
// Blocks that run at the same time take about as many tiles of outputs as of tokens, so that what
// they read stays in L2: columns of 16 tiles of outputs, and in each its tokens one after another.
OW_DEVICE NmResultTile result_tile(unsigned token_tiles, unsigned output_tiles, unsigned block) {
  constexpr unsigned kWidth = 16;
  const unsigned first = block / (kWidth * token_tiles) * kWidth;
  const unsigned width = unsigned(min_of(kWidth, output_tiles - first));
  const unsigned within = block % (kWidth * token_tiles);
  return {within / width, first + within % width};
}

// A group's sum is scaled every `span` columns, and at the end.
template <class Tiles, int kXPieces>
__global__ void __launch_bounds__(kNmManyThreads, (NmManyShape<Tiles, kXPieces>::kBlocks))
    nm_many(NmGemmArgs a, NmRows x, int32_t span) {
  using Shape = NmManyShape<Tiles, kXPieces>;
  uint8_t* shared = dynamic_shared();
  const int warp = int(threadIdx.x) / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  const NmResultTile result = result_tile(unsigned(div_up(a.m, Shape::kTokens)),
                                          unsigned(div_up(a.n, kNmOutputs)), blockIdx.x);
  const unsigned first_token = result.tokens * Shape::kTokens;
  const int first_panel = int(result.outputs) * kNmPanels;
  const int own_panel = warp % kNmWarpRows * kNmWarpPanels;
  const int own_token = warp / kNmWarpRows * Shape::kEights * 8;
  const int panel = first_panel + own_panel;
  // Of the warp; none if it is past n.
  const int tokens = panel * kNmPanel < a.n ? int(min_of(a.m - first_token, Shape::kTokens)) : 0;
  const int tiles = int(div_up(a.k, kNmTile));
  Tiles weights(first_panel, panel, shared + Shape::kStages * Shape::kStageBytes);
  NmManySums<Tiles, kXPieces> sums;
  int g = 0;       // the group that is summed,
  int end = span;  // and the column where that ends

  const auto stage = [&](int tile) {
    uint8_t* to = shared + tile % Shape::kStages * Shape::kStageBytes;
    stage_rows<kXPieces, Shape::kTokens>(x, a.m, first_token, tile * kNmTile, to);
    weights.stage(a, tile, to + Shape::kRowsBytes);
  };
  OW_NO_UNROLL
  for (int tile = 0; tile < Shape::kStages - 1; ++tile) {
    if (tile < tiles) stage(tile);
    ptx::cp_async_commit_group();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait_group<Shape::kStages - 2>();
    __syncthreads();  // the tile is there, and the one before is read
    if (tile + Shape::kStages - 1 < tiles) stage(tile + Shape::kStages - 1);
    ptx::cp_async_commit_group();
    const uint8_t* staged = shared + tile % Shape::kStages * Shape::kStageBytes;
    weights.take(a, tile, staged + Shape::kRowsBytes);
    if (tokens <= own_token) continue;
    const auto* rows = reinterpret_cast<const typename Tiles::T*>(staged) + own_token * kNmRow;
    OW_UNROLL
    for (int step = 0; step < 2; ++step) {
      sums.add(weights, rows, tokens - own_token, step, lane);
      if (Tiles::kScaled && tile * kNmTile + (step + 1) * kNmStep == end) {
        sums.fold_group(a, weights, panel, g, step);
        end += span;
        if (a.groups > 1) ++g;
      }
    }
  }
  if (Tiles::kScaled) sums.fold_group(a, weights, panel, g, 1);

  ptx::cp_async_wait_group<0>();
  __syncthreads();  // the last tile is read
  float* results = reinterpret_cast<float*>(shared);
  sums.store(results + own_token * Shape::kResultRow + own_panel * int(kNmPanel), lane);
  __syncthreads();  // the results are written
  OW_NO_UNROLL
  for (int i = int(threadIdx.x); i < Shape::kTokens * kNmOutputs; i += kNmManyThreads) {
    const int token = i / kNmOutputs;
    const int output = i % kNmOutputs;
    store_result(a, int64_t{first_token} + token, first_panel * kNmPanel + output,
                 results[token * Shape::kResultRow + output]);
  }
}

}  // namespace ow
