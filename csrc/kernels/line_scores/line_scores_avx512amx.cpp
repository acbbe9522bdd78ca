// bf16 keys on AMX. A product adds to 16 keys x 16 queries
//
//   sums[16 keys, 16 queries] += k[16 keys, 32 elements] * packed[16 pairs of elements, 16 queries]
//
// of keys where they lie and a panel of pairs. Four products, of the panel's four vectors, share a
// tile of keys.
#include "kernels/line_scores/line_scores_body.h"

namespace ow {
namespace avx512amx {
namespace {

constexpr int64_t kTileKeys = 16;

struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The intrinsics do not say that they read memory, and gcc moves stores behind them.
template <int kTile>
OW_INLINE void tile_load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
OW_INLINE void tile_store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
}

struct TileProduct {
  static int64_t depth(const Panel<bf16>& p) { return round_up(p.d, kProbeDepth); }

  // [depth / 2, 64, 2], zero past d and past the rows.
  static void pack(const Panel<bf16>& p) {
    bf16* packed = reinterpret_cast<bf16*>(p.packed);
    memset(packed, 0, size_t(depth(p) * kProbePanel) * sizeof(bf16));
    for (int64_t l = 0; l < p.rows; ++l) {
      for (int64_t i = 0; i < p.d; ++i) {
        packed[(i / 2 * kProbePanel + l) * 2 + i % 2] = p.q[l * p.q_stride + i];
      }
    }
  }

  static void tile(const Panel<bf16>& p, const bf16* k, int64_t stride, float* out) {
    const char* lines = reinterpret_cast<const char*>(p.packed);
    constexpr int64_t kLineBytes = kProbePanel * 2 * int64_t(sizeof(bf16));
    asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
    for (int64_t i = 0; i < depth(p); i += kProbeDepth) {
      const char* at = lines + i / 2 * kLineBytes;
      tile_load<4>(k + i, stride * int64_t(sizeof(bf16)));
      tile_load<5>(at, kLineBytes);
      tile_load<6>(at + 64, kLineBytes);
      asm volatile("tdpbf16ps %%tmm5, %%tmm4, %%tmm0\n tdpbf16ps %%tmm6, %%tmm4, %%tmm1" ::);
      tile_load<5>(at + 128, kLineBytes);
      tile_load<6>(at + 192, kLineBytes);
      asm volatile("tdpbf16ps %%tmm5, %%tmm4, %%tmm2\n tdpbf16ps %%tmm6, %%tmm4, %%tmm3" ::);
    }
    constexpr int64_t kRowBytes = kProbePanel * int64_t(sizeof(float));
    tile_store<0>(out, kRowBytes);
    tile_store<1>(out + 16, kRowBytes);
    tile_store<2>(out + 32, kRowBytes);
    tile_store<3>(out + 48, kRowBytes);
  }

  // Fewer keys than a tile, or a depth that is not whole, are copied and filled up with zeros.
  // `out` has room for the whole tile: scores of a chunk end where a chunk does.
  static void run(const Panel<bf16>& p, int64_t key, int64_t count, float* out) {
    constexpr int64_t kMaxCopied = 512;
    for (int64_t j = 0; j < count; j += kTileKeys) {
      const bf16* k = p.k + (key + j) * p.k_stride;
      const int64_t keys = min_of(kTileKeys, count - j);
      if (keys == kTileKeys && p.d == depth(p)) {
        tile(p, k, p.k_stride, out + j * kProbePanel);
        continue;
      }
      alignas(64) bf16 copy[kTileKeys * kMaxCopied];
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
  if (args.d > 512) return avx512amx::score_any(args, scratch, begin, end);
  const avx512amx::TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
  avx512amx::score_units<bf16, avx512amx::TileProduct>(args, scratch, begin, end);
  asm volatile("tilerelease");
}

}  // namespace ow
