// Launching a kernel: the only place with <<< >>>.
#pragma once

#include "cuda/device.h"
#include "cuda/status.h"

namespace ow {

// More dynamic shared memory than this must be asked for.
constexpr int kPlainSharedBytes = 48 * 1024;

template <class... Params, class... Args>
LaunchStatus launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads,
                    int shared_bytes, void* stream, Args... args) {
#if defined(__CUDACC__)
  if (shared_bytes > kPlainSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return {name, int(error)};
  }
  kernel<<<grid, dim3(unsigned(threads)), size_t(shared_bytes), cudaStream_t(stream)>>>(args...);
  return {name, int(cudaGetLastError())};
#else
  (void)stream;
  emulation::launch(grid, dim3(unsigned(threads)), size_t(shared_bytes),
                    [&] { kernel(Params(args)...); });
  return {name, 0};
#endif
}

}  // namespace ow
