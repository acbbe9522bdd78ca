// _host: stateful objects Python holds. Memory crosses as numpy arrays, never as tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "host/page_pool.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side objects of openwork.";
  py::class_<ow::PagePool>(m, "PagePool", "Huge-page memory for packed weights.")
      .def(py::init<>())
      .def(
          "empty",
          [](ow::PagePool& pool, size_t bytes) {
            ow::PagePool::Slice slice = pool.allocate(bytes);
            auto* owner = new std::shared_ptr<void>(std::move(slice.chunk));
            py::capsule release(owner,
                                [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
            return py::array_t<uint8_t>({py::ssize_t(bytes)}, {py::ssize_t(1)}, slice.data,
                                        release);
          },
          py::arg("nbytes"), "A uint8 array of nbytes, 64-byte aligned; freed with its last view.")
      .def_property_readonly("mapped_bytes", &ow::PagePool::mapped_bytes);
}
