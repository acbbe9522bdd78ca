// What the op layer asks of the CUDA runtime, answered for a device that is a CPU. Tests make it an
// older or a smaller one by environment variables.
#include <stdlib.h>

#include "cuda/status.h"
#include "testing/cuda/block.h"

namespace ow {
namespace {

// Names and numbers are CUDA's.
constexpr int kErrorInvalidValue = 1;
constexpr int kErrorInvalidConfiguration = 9;
constexpr int kErrorInsufficientDriver = 35;

int setting(const char* variable, int otherwise) {
  const char* text = getenv(variable);
  return text == nullptr ? otherwise : atoi(text);
}

}  // namespace

namespace emulation {

int launch_error(dim3 grid, int threads, int shared_bytes) {
  // What a block may have on every GPU since sm_80 (sm_86, 89 and 120 have the least).
  constexpr int kShared = 99 * 1024;
  constexpr unsigned kMostX = 0x7fffffff;
  constexpr unsigned kMostYZ = 65535;
  if (shared_bytes > setting("OPENWORK_EMULATED_SHARED", kShared)) return kErrorInvalidValue;
  const bool empty = grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0;
  const bool large = grid.x > kMostX || grid.y > kMostYZ || grid.z > kMostYZ;
  return empty || large || unsigned(threads) > kMaxThreads ? kErrorInvalidConfiguration : 0;
}

}  // namespace emulation

const char* launch_error_text(int error) {
  switch (error) {
    case kErrorInvalidValue: return "invalid argument";
    case kErrorInvalidConfiguration: return "invalid configuration argument";
    case kErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
  }
  return "no error";
}
int compute_capability(int) { return setting("OPENWORK_EMULATED_CAPABILITY", 80); }
// More than small sizes have tiles for, which are cut then.
int multiprocessors(int) { return 4; }

}  // namespace ow
