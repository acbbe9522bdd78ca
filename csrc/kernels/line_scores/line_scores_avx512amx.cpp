// bf16 keys on AMX. A product adds to 16 keys x 16 queries
//
//   sums[16 keys, 16 queries] += k[16 keys, 32 elements] * packed[16 pairs of elements, 16 queries]
//
// of keys where they lie and a panel of pairs. Four products, of the panel's four vectors, share a
// tile of keys.
#include "kernels/line_scores/line_scores_avx512bf16.h"
#include "simd/tiles.h"

namespace ow {
namespace avx512amx {
namespace {

constexpr int64_t kTileKeys = kTileRows;
// Elements of a key that may have to be copied; longer ones take the floats' way.
constexpr int64_t kMostCopied = 512;

struct TileProduct : PairPanel {
  static void tile(const Panel<bf16>& p, const bf16* k, int64_t stride, float* out) {
    const char* lines = reinterpret_cast<const char*>(p.packed);
    constexpr int64_t kLineBytes = kProbePanel * 2 * int64_t(sizeof(bf16));
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
    for (int64_t i = 0; i < depth(p); i += kProbeDepth) {
      const char* at = lines + i / 2 * kLineBytes;
      load_tile<4>(k + i, stride * int64_t(sizeof(bf16)));
      load_tile<5>(at, kLineBytes);
      load_tile<6>(at + 64, kLineBytes);
      multiply_bf16<0, 4, 5>();
      multiply_bf16<1, 4, 6>();
      load_tile<5>(at + 128, kLineBytes);
      load_tile<6>(at + 192, kLineBytes);
      multiply_bf16<2, 4, 5>();
      multiply_bf16<3, 4, 6>();
    }
    constexpr int64_t kRowBytes = kProbePanel * int64_t(sizeof(float));
    store_tile<0>(out, kRowBytes);
    store_tile<1>(out + 16, kRowBytes);
    store_tile<2>(out + 32, kRowBytes);
    store_tile<3>(out + 48, kRowBytes);
  }

  // Fewer keys than a tile, or a depth that is not whole, are copied and filled up with zeros.
  // `out` has room for the whole tile: scores of a chunk end where a chunk does.
  static void run(const Panel<bf16>& p, int64_t key, int64_t count, float* out) {
    for (int64_t j = 0; j < count; j += kTileKeys) {
      const bf16* k = p.k + (key + j) * p.k_stride;
      const int64_t keys = min_of(kTileKeys, count - j);
      if (keys == kTileKeys && p.d == depth(p)) {
        tile(p, k, p.k_stride, out + j * kProbePanel);
        continue;
      }
      alignas(64) bf16 copy[kTileKeys * kMostCopied];
      memset(copy, 0, size_t(kTileKeys * depth(p)) * sizeof(bf16));
      for (int64_t r = 0; r < keys; ++r) {
        memcpy(copy + r * depth(p), k + r * p.k_stride, size_t(p.d) * sizeof(bf16));
      }
      tile(p, copy, depth(p), out + j * kProbePanel);
    }
  }
};

}  // namespace
}  // namespace avx512amx

void line_scores_bf16_avx512amx(const LineScoresArgs& args, float* scratch, int64_t begin,
                                int64_t end) {
  if (args.d > avx512amx::kMostCopied) return avx512amx::score_any(args, scratch, begin, end);
  avx512amx::open_tiles();
  avx512amx::score_units<bf16, avx512amx::TileProduct>(args, scratch, begin, end);
  avx512amx::close_tiles();
}

}  // namespace ow
