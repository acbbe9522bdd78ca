#include "kernels/activations/activations_body.h"

namespace ow {

const ActivationKernels activations_scalar = {scalar::rms_norm_any, scalar::silu_mul_any,
                                              scalar::rope_any};

}  // namespace ow
