// What the bindings of all families take: numpy arrays of the three float types.
#pragma once

#include <pybind11/numpy.h>

#include <stdexcept>
#include <string>

#include "core/types.h"

namespace py = pybind11;

namespace ow {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Arrays of float32, float16, or uint16: numpy has no bf16, so its bits travel as uint16.
inline FloatType float_type(const py::array& array, const char* name) {
  const char kind = array.dtype().kind();
  const py::ssize_t size = array.itemsize();
  if (kind == 'f' && size == 4) return FloatType::f32;
  if (kind == 'f' && size == 2) return FloatType::f16;
  if (kind == 'u' && size == 2) return FloatType::bf16;
  throw std::invalid_argument(std::string(name) +
                              " must be float32, float16 or uint16 (the bits of bf16)");
}

inline void check_contiguous(const py::array& array, const char* name) {
  if (!(array.flags() & py::array::c_style)) {
    throw std::invalid_argument(std::string(name) + " must be contiguous");
  }
}

}  // namespace ow
