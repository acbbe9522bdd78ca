#include "kernels/activations/activations_body.h"

namespace ow {

const ActivationKernels activations_avx2 = {avx2::rms_norm_any, avx2::silu_mul_any, avx2::rope_any};

}  // namespace ow
