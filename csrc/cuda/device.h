// What a .cu file starts with. nvcc gets CUDA; any other compiler gets the emulation, which runs
// the same kernels on the CPU for tests.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <stdint.h>
#define OW_INLINE static inline __attribute__((always_inline)) __host__ __device__
#else
#include "testing/cuda/device.h"
#endif

#define OW_DEVICE __device__ __forceinline__
#define OW_UNROLL _Pragma("unroll")
#define OW_NO_UNROLL _Pragma("unroll 1")

namespace ow {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(__CUDACC__)
// The block's dynamic shared memory.
OW_DEVICE uint8_t* dynamic_shared() {
  extern __shared__ __align__(128) uint8_t bytes[];
  return bytes;
}
#else
using emulation::dynamic_shared;
#endif

}  // namespace ow
