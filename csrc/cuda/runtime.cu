#include "cuda/device.h"
#include "cuda/status.h"

namespace ow {

const char* launch_error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

int compute_capability(int device) {
  int major = 0;
  int minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  return error == cudaSuccess ? 10 * major + minor : -int(error);
}

int multiprocessors(int device) {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

}  // namespace ow
