// The transform on a GPU (hadamard.cu).
#pragma once

#include "cuda/status.h"
#include "kernels/hadamard/hadamard.h"

namespace ow {

// Transforms every block on `stream`, a cudaStream_t; pointers are of device memory, y aligned to
// 16 bytes. At least one block.
LaunchStatus launch_hadamard(const HadamardArgs& args, void* stream);

}  // namespace ow
