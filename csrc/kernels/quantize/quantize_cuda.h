// The encoder on a GPU (quantize.cu).
#pragma once

#include "cuda/status.h"
#include "kernels/quantize/quantize.h"

namespace ow {

// Encodes every row on `stream`, a cudaStream_t; pointers are of device memory. At least one row.
// Rows of codes lie one after another (blocks.rows = 1). No GPU kernel has a use for sums, which
// are not made.
LaunchStatus launch_encode_rows(const EncodeArgs& args, void* stream);

}  // namespace ow
