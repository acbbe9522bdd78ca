// The kernels that sparse attention is steered by, as functions of the module _kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace ow {

void bind_scores_kernels(pybind11::module_& m);

}  // namespace ow
