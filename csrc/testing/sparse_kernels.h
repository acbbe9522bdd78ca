// The kernels of sparse weights as functions of the module _kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace ow {

void bind_sparse_kernels(pybind11::module_& m);

}  // namespace ow
