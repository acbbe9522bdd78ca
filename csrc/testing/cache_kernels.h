// The kernels over pages of keys and values as functions of the module _kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace ow {

void bind_cache_kernels(pybind11::module_& m);

}  // namespace ow
