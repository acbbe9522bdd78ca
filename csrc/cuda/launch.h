// Launching a kernel: the only place with <<< >>>; and what else is queued on a stream.
#pragma once

#include <string.h>

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
  const int error = emulation::launch_error(grid, threads, shared_bytes);
  if (error != 0) return {name, error};
  emulation::launch(grid, dim3(unsigned(threads)), size_t(shared_bytes),
                    [&] { kernel(Params(args)...); });
  return {name, 0};
#endif
}

inline LaunchStatus fill_bytes(void* device, int value, int64_t bytes, void* stream) {
#if defined(__CUDACC__)
  return {"memset", int(cudaMemsetAsync(device, value, size_t(bytes), cudaStream_t(stream)))};
#else
  (void)stream;
  memset(device, value, size_t(bytes));
  return {"memset", 0};
#endif
}

// Copies to the host, and waits for it, what kernels before it on `stream` wrote. Its error may be
// of one of them.
inline LaunchStatus read_back(void* host, const void* device, int64_t bytes, void* stream) {
#if defined(__CUDACC__)
  cudaError_t error =
      cudaMemcpyAsync(host, device, size_t(bytes), cudaMemcpyDeviceToHost, cudaStream_t(stream));
  if (error == cudaSuccess) error = cudaStreamSynchronize(cudaStream_t(stream));
  return {"memcpy", int(error)};
#else
  (void)stream;
  memcpy(host, device, size_t(bytes));
  return {"memcpy", 0};
#endif
}

}  // namespace ow
