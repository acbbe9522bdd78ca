// The tile registers of AMX: up to 16 rows of 64 bytes. One product adds to 16 x 16 sums
//
//   sums[i][j] += sum_k x[i][k] * lines[k / K][j][k % K]
//
// with K = 4 bytes, or 2 bf16, to a lane: x has 64 bytes a row, and a line holds K of k for each of
// 16 columns.
#pragma once

#include <immintrin.h>

#include "core/types.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;

// Every register 16 rows of 64 bytes. Released again at the end: until then each switch of threads
// saves 8 KiB.
OW_INLINE void open_tiles() {
  struct {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
OW_INLINE void close_tiles() { asm volatile("tilerelease"); }

template <int kT>
OW_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kT));
}
// The intrinsics do not say that they read memory, and gcc moves stores behind them. `stride` is in
// bytes.
template <int kT>
OW_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kT) : "memory");
}
template <int kT>
OW_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kT) : "memory");
}
template <int kSums, int kX, int kLines>
OW_INLINE void multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kLines));
}
// Signed x, unsigned lines.
template <int kSums, int kX, int kLines>
OW_INLINE void multiply_codes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kLines));
}

}  // namespace
}  // namespace ow::OW_TARGET
