// Small kernels that use every instruction of cuda/ptx.h, for check.cu. OW_DEFECT plants one of the
// defects that the emulation must find.
#pragma once

#include "cuda/device.h"

#include "core/types.h"
#include "cuda/fragments.h"
#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/ptx.h"

#if !defined(OW_DEFECT)
#define OW_DEFECT 0
#endif

namespace ow::check {

enum Defect {
  kNone,
  kNoBarrier,         // in the pipeline
  kRowOutside,        // one row of shared memory past its end
  kWaitTooShort,      // for one group of copies too few
  kWrongFragment,     // a register of b
  kDivergentBarrier,  // reached by half the threads
  kStageOverwritten,  // while it is read
  kIndexOutside,      // of a static shared array
  kNoWarpBarrier,     // between lanes that exchange through memory
  kNoBarrierInSum,    // before the warps' sums are read
  kMisalignedCopy,
};
constexpr int kDefect = OW_DEFECT;

// y[m,n] = sum_k x[m,k] w[n,k] for 64 x 64 outputs a block; k % 8 == 0.
constexpr int kTile = 64;
constexpr int kTileK = 32;
constexpr int kRow = kTileK + 8;  // 16 bytes more, so that ldmatrix meets no bank twice
constexpr int kStages = 3;
constexpr int kGemmThreads = 128;
constexpr int kGemmBytes = kStages * 2 * kTile * kRow * 2;

template <class T>
__global__ void __launch_bounds__(kGemmThreads)
    gemm(const T* x, const T* w, float* y, int m, int n, int k) {
  T* x_tile = reinterpret_cast<T*>(dynamic_shared());
  T* w_tile = x_tile + kStages * kTile * kRow;
  const int thread = int(threadIdx.x);
  const int lane = thread % kWarp;
  const int row0 = thread / kWarp % 2 * 32;
  const int column0 = thread / kWarp / 2 * 32;
  const int m0 = int(blockIdx.y) * kTile;
  const int n0 = int(blockIdx.x) * kTile;
  float d[2][4][4] = {};
  auto load = [&](T* tile, const T* from, int first, int count, int step, int stage, int past) {
    for (int c = thread; c < kTile * kTileK / 8; c += kGemmThreads) {
      const int row = c / (kTileK / 8);
      const int at = c % (kTileK / 8) * 8;
      const bool inside = first + row < count && step * kTileK + at < k;
      T* to = tile + (stage * kTile + row + past) * kRow + at + (kDefect == kMisalignedCopy);
      ptx::cp_async_cg_16(to, inside ? from + int64_t(first + row) * k + step * kTileK + at : from,
                          inside ? 16 : 0);
    }
  };
  auto load_both = [&](int step, int stage) {
    load(x_tile, x, m0, m, step, stage, 0);
    load(w_tile, w, n0, n, step, stage, kDefect == kRowOutside);
  };
  const int steps = (k + kTileK - 1) / kTileK;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load_both(s, s);
    ptx::cp_async_commit_group();
  }
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<kStages - 2 + (kDefect == kWaitTooShort)>();
    if (kDefect != kNoBarrier && (kDefect != kDivergentBarrier || thread < 64)) __syncthreads();
    const int stage = step % kStages;
    const int ahead = step + kStages - 1;
    if (ahead < steps) load_both(ahead, kDefect == kStageOverwritten ? stage : ahead % kStages);
    ptx::cp_async_commit_group();
    for (int k0 = 0; k0 < kTileK; k0 += 16) {
      uint32_t a[2][4];
      uint32_t b[2][4];
      for (int i = 0; i < 2; ++i) {
        ptx::ldmatrix_x4(
            a[i], x_tile + (stage * kTile + row0 + i * 16 + lane % 16) * kRow + k0 + lane / 16 * 8);
        ptx::ldmatrix_x4(
            b[i], w_tile + (stage * kTile + column0 + i * 16 + lane / 16 * 8 + lane % 8) * kRow +
                      k0 + lane / 8 % 2 * 8);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          const int first = kDefect == kWrongFragment ? j % 2 : j % 2 * 2;
          mma(T{}, d[i][j], a[i], b[j / 2][first], b[j / 2][first + 1]);
        }
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = m0 + row0 + i * 16 + lane / 4 + e / 2 * 8;
        const int column = n0 + column0 + j * 8 + lane % 4 * 2 + e % 2;
        if (row < m && column < n) y[int64_t(row) * n + column] = d[i][j][e];
      }
    }
  }
}

// y[n,m] = sum_k w[n,k] x[m,k] for int8 w and x; n % 16, m % 8 and k % 32 are 0.
static __global__ void gemm_s8(const int8_t* w, const int8_t* x, int* y, int m, int k) {
  const int lane = int(threadIdx.x);
  const int n0 = int(blockIdx.y) * 16;
  const int m0 = int(blockIdx.x) * 8;
  int d[4] = {};
  for (int k0 = 0; k0 < k; k0 += 32) {
    uint32_t a[4];
    uint32_t b[2];
    for (int i = 0; i < 4; ++i) {
      memcpy(&a[i], w + (n0 + lane / 4 + i % 2 * 8) * k + k0 + lane % 4 * 4 + i / 2 * 16, 4);
    }
    for (int i = 0; i < 2; ++i) {
      memcpy(&b[i], x + (m0 + lane / 4) * k + k0 + lane % 4 * 4 + i * 16, 4);
    }
    ptx::mma_m16n8k32_s8(d, a, b[0], b[1]);
  }
  for (int e = 0; e < 4; ++e) {
    y[(n0 + lane / 4 + e / 2 * 8) * m + m0 + lane % 4 * 2 + e % 2] = d[e];
  }
}

// y[n,m] of a 2:4 sparse w: values [n, k/2], metadata [n, k/16]. n % 16, m % 8 and k % 32 are 0.
template <class T, int kSelector>
__global__ void gemm_sparse(const T* values, const uint16_t* metadata, const T* x, float* y, int m,
                            int k) {
  const int lane = int(threadIdx.x);
  const int n0 = int(blockIdx.y) * 16;
  const int m0 = int(blockIdx.x) * 8;
  const int row = n0 + lane / 4;
  float d[4] = {};
  for (int k0 = 0; k0 < k; k0 += 32) {
    uint32_t a[4];
    uint32_t b[4];
    for (int i = 0; i < 4; ++i) {
      memcpy(&a[i], values + (row + i % 2 * 8) * (k / 2) + k0 / 2 + lane % 4 * 2 + i / 2 * 8, 4);
      memcpy(&b[i], x + (m0 + lane / 4) * k + k0 + lane % 4 * 2 + i * 8, 4);
    }
    uint32_t kept = 0;
    for (int half = 0; half < 2; ++half) {
      const fragments::Metadata at = fragments::metadata_sp_m16n8k32(lane, half);
      // Lanes that are not looked at hold what would be an error.
      const uint32_t bits =
          at.selector == kSelector ? metadata[(n0 + at.row) * (k / 16) + (k0 + at.column) / 16] : 0;
      kept |= bits << (16 * half);
    }
    mma_sparse<kSelector>(T{}, d, a, b, kept);
  }
  for (int e = 0; e < 4; ++e) {
    y[(n0 + lane / 4 + e / 2 * 8) * m + m0 + lane % 4 * 2 + e % 2] = d[e];
  }
}

// y[row] = sum_i x[row,i], a block of 128 threads a row.
constexpr int kSumThreads = 128;
static __global__ void sum_rows(const float* x, float* y, int n) {
  __shared__ float of_warps[kSumThreads / kWarp];
  const int thread = int(threadIdx.x);
  float sum = 0.0f;
  for (int i = thread; i < n; i += kSumThreads) sum += x[int64_t(blockIdx.x) * n + i];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  }
  if (thread % kWarp == 0) of_warps[thread / kWarp + (kDefect == kIndexOutside)] = sum;
  if (kDefect != kNoBarrierInSum) __syncthreads();
  if (thread != 0) return;
  sum = 0.0f;
  for (int warp = 0; warp < kSumThreads / kWarp; ++warp) sum += of_warps[warp];
  y[blockIdx.x] = sum;
}

// Each warp counts the odd values, which it reads through shared memory in reverse.
static __global__ void count_odd(const int* x, int* total, int n) {
  __shared__ int values[kSumThreads];
  const int thread = int(threadIdx.x);
  const int lane = thread % kWarp;
  const int i = int(blockIdx.x) * kSumThreads + thread;
  values[thread] = i < n ? x[i] : 0;
  if (kDefect != kNoWarpBarrier) __syncwarp();
  const int value = values[thread - lane + kWarp - 1 - lane];
  const unsigned odd = __ballot_sync(kAllLanes, value % 2 != 0);
  if (lane == 0) atomicAdd(total, __popc(odd));
}

OW_DEVICE uint32_t bf16_pair(int low, int high) {
  return float_to_bits(float(low)) >> 16 | (float_to_bits(float(high)) & 0xffff0000);
}

// y[i] = x[i] where i % 3 != 0, by way of shared memory; else 0.
static __global__ void copy_words(const uint32_t* x, uint32_t* y) {
  __shared__ uint32_t words[kSumThreads];
  const int thread = int(threadIdx.x);
  words[thread] = ~0u;
  ptx::cp_async_ca_4(&words[thread], x + thread, thread % 3 == 0 ? 0 : 4);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  y[thread] = words[thread];
}

// The instructions on registers: out[kRegisterCases i ..] from a[i], b[i] and f[i].
constexpr int kRegisterCases = 7;
static __global__ void registers(const uint32_t* a, const uint32_t* b, const float* f,
                                 uint32_t* out, int n) {
  for (int i = int(threadIdx.x); i < n; i += kWarp) {
    out[kRegisterCases * i] = ptx::prmt_b32(a[i], b[i], 0x5140);
    out[kRegisterCases * i + 1] = ptx::sub_f16x2(a[i], b[i]);
    out[kRegisterCases * i + 2] = ptx::cvt_rn_bf16x2_f32(f[i], -f[i]);
    out[kRegisterCases * i + 3] = uint32_t(ptx::cvt_rni_s32_f32(f[i]));
    out[kRegisterCases * i + 5] = float_to_bits(ptx::cvt_f32_f16(uint16_t(a[i])));
    out[kRegisterCases * i + 6] = ptx::cvt_rn_f16x2_f32(f[i], -f[i]);
    // Of small integers: three times one less the other.
    out[kRegisterCases * i + 4] =
        ptx::fma_rn_bf16x2(bf16_pair(a[i] & 15, a[i] >> 4 & 15), bf16_pair(3, 3),
                           bf16_pair(-int(b[i] & 15), -int(b[i] >> 4 & 15)));
  }
}

}  // namespace ow::check
