// The tile registers of AMX.
#pragma once

#include "kernels/lowbit_gemm/lowbit_gemm_avx512bf16.h"

namespace ow::OW_TARGET {
namespace {

// What a product multiplies.
enum class Kind { kSigned, kUnsigned, kBf16 };

struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Shapes the registers: `sums` of them hold sums, the next `x` rows of x, the others lines. A
// product takes `chunk` bytes of x's depth. Released again at the end: until then each switch of
// threads saves 8 KiB.
OW_INLINE void shape_tiles(int64_t chunk, int sums, int x) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    const bool lines = t >= sums + x;
    config.row_bytes[t] = uint16_t(t >= sums && !lines ? chunk : 64);
    config.rows[t] = uint8_t(lines ? chunk / 4 : kAmxRows);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}
OW_INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int kT>
OW_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kT));
}
// The intrinsics do not say that they read memory, and gcc moves stores behind them.
template <int kT>
OW_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kT) : "memory");
}
template <int kT>
OW_INLINE void tile_store(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(kT) : "memory");
}
// Every CPU with tiles has it, but gcc asks for a flag of its own.
OW_INLINE void fetch_to_write(const void* p) { asm volatile("prefetchw (%0)" ::"r"(p)); }
template <Kind kKind, int kSums, int kX, int kLines>
OW_INLINE void tile_dot() {
  if constexpr (kKind == Kind::kSigned) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kLines));
  } else if constexpr (kKind == Kind::kUnsigned) {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kLines));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kLines));
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
