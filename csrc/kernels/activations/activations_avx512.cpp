#include "kernels/activations/activations_body.h"

namespace ow {

const ActivationKernels activations_avx512 = {avx512::rms_norm_any, avx512::silu_mul_any,
                                              avx512::rope_any};

}  // namespace ow
