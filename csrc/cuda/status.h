// What a launch returns to the op layer, which turns an error into a message.
#pragma once

namespace ow {

struct LaunchStatus {
  const char* kernel;  // the one that was launched last
  int error;           // a CUDA error code; 0 is success
};

// Implemented in cuda/runtime.cu, and in testing/cuda/runtime.cpp for the emulation.
const char* launch_error_text(int error);
// 10 * major + minor, as in sm_80, or minus the CUDA error where the runtime cannot say: one that
// is newer than the driver, for instance.
int compute_capability(int device);
// Of a device, at least 1.
int multiprocessors(int device);

}  // namespace ow
