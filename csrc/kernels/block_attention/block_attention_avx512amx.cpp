// Products by AMX tiles: 16 rows of K or V^T, 32 deep, by 16 queries. Both sides are read where
// they lie. Two by two sums at a time: a product takes 16 cycles and its sums are ready after 52.
#include "kernels/block_attention/block_attention_avx512bf16.h"
#include "simd/tiles.h"

namespace ow {
namespace avx512amx {
namespace {

struct TileEngine : Bf16Operands {
  // kR by kC tiles of sums, registers 0 .. 3; of the left side in 4, 5, of the right in 6, 7.
  template <int kR, int kC>
  static void multiply_tiles(const Product<bf16>& p, int64_t row, int64_t lane) {
    constexpr int64_t kRowBytes = kQueryTile * 4;  // of sums, and of a pair of depths
    float* c = p.c + row * kQueryTile + lane;
    float* const below = c + kTileRows * kQueryTile;
    if (p.add) {
      load_tile<0>(c, kRowBytes);
      if constexpr (kC > 1) load_tile<1>(c + kTileRows, kRowBytes);
      if constexpr (kR > 1) load_tile<2>(below, kRowBytes);
      if constexpr (kR > 1 && kC > 1) load_tile<3>(below + kTileRows, kRowBytes);
    } else {
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    }
    const bf16* b = p.b + 2 * lane;
    for (int64_t s = 0; s < p.segments; ++s) {
      const bf16* a = p.a[s] + row * p.row_stride;
      for (int64_t i = 0; i < p.depth; i += kDepth, b += kDepth * kQueryTile) {
        load_tile<4>(a + i, p.row_stride * 2);
        load_tile<6>(b, kRowBytes);
        multiply_bf16<0, 4, 6>();
        if constexpr (kC > 1) {
          load_tile<7>(b + 2 * kTileRows, kRowBytes);
          multiply_bf16<1, 4, 7>();
        }
        if constexpr (kR > 1) {
          load_tile<5>(a + i + kTileRows * p.row_stride, p.row_stride * 2);
          multiply_bf16<2, 5, 6>();
        }
        if constexpr (kR > 1 && kC > 1) multiply_bf16<3, 5, 7>();
      }
    }
    store_tile<0>(c, kRowBytes);
    if constexpr (kC > 1) store_tile<1>(c + kTileRows, kRowBytes);
    if constexpr (kR > 1) store_tile<2>(below, kRowBytes);
    if constexpr (kR > 1 && kC > 1) store_tile<3>(below + kTileRows, kRowBytes);
  }

  template <int kC>
  static void multiply_lanes(const Product<bf16>& p, int64_t lane) {
    int64_t row = 0;
    for (; row + 2 * kTileRows <= p.rows; row += 2 * kTileRows) {
      multiply_tiles<2, kC>(p, row, lane);
    }
    if (row < p.rows) multiply_tiles<1, kC>(p, row, lane);
  }

  static void multiply(const Product<bf16>& p) {
    int64_t lane = 0;
    for (; lane + 2 * kTileRows <= p.queries; lane += 2 * kTileRows) multiply_lanes<2>(p, lane);
    if (lane < p.queries) multiply_lanes<1>(p, lane);
  }
};

void attend_tiles(const BlockAttentionArgs& a, QueryTile& tile, uint8_t* scratch) {
  open_tiles();
  attend<TileEngine>(a, tile, scratch);
  close_tiles();
}

}  // namespace
}  // namespace avx512amx

const BlockAttentionKernels block_attention_bf16_avx512amx{
    avx512amx::packed_unit_bytes<avx512amx::TileEngine>,
    avx512amx::scratch_bytes<avx512amx::TileEngine>, avx512amx::pack<avx512amx::TileEngine>,
    avx512amx::attend_tiles};

}  // namespace ow
