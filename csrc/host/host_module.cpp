// _host: stateful objects Python holds. Memory crosses as numpy arrays, never as tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/page_allocator.h"
#include "host/page_pool.h"

namespace py = pybind11;

namespace {

using Table = py::array_t<int32_t, py::array::c_style>;
using Counts = py::array_t<int64_t, py::array::c_style>;
using Runs = std::vector<std::pair<int32_t, int32_t>>;

void bind_page_pool(py::module_& m) {
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

void bind_page_allocator(py::module_& m) {
  py::class_<ow::PageAllocator>(m, "PageAllocator", "Numbers of pages, held by rows of a table.")
      .def(py::init<int32_t>(), py::arg("pages"))
      .def(
          "resize",
          [](ow::PageAllocator& self, Table& table, const Counts& counts) {
            if (table.ndim() != 2 || counts.ndim() != 1 || counts.shape(0) != table.shape(0)) {
              throw std::invalid_argument("table must be [rows, max_pages], counts [rows]");
            }
            return self.resize(table.mutable_data(), table.shape(0), table.shape(1), counts.data());
          },
          py::arg("table").noconvert(), py::arg("counts"))
      .def(
          "hold",
          [](ow::PageAllocator& self, const Table& pages) {
            self.hold(pages.data(), pages.size());
          },
          py::arg("pages"))
      .def(
          "unshare",
          [](ow::PageAllocator& self, Table& row, int64_t begin, int64_t end) {
            if (row.ndim() != 1 || begin < 0 || end > row.shape(0)) {
              throw std::invalid_argument("row must be [max_pages] and hold begin .. end");
            }
            return self.unshare(row.mutable_data(), begin, end);
          },
          py::arg("row").noconvert(), py::arg("begin"), py::arg("end"))
      .def("free_runs", &ow::PageAllocator::free_runs, py::arg("pages"))
      .def_property_readonly("pages", &ow::PageAllocator::pages)
      .def_property_readonly("free_pages", &ow::PageAllocator::free_pages)
      .def_property_readonly("shared_pages", &ow::PageAllocator::shared_pages);
  m.def(
      "release_memory",
      [](py::array_t<uint8_t, py::array::c_style>& pool, int64_t pages, const Runs& runs) {
        for (const auto& [begin, end] : runs) {
          if (begin < 0 || end > pages) throw std::out_of_range("a run ends past the pool");
        }
        if (pages > 0) ow::release_memory(pool.mutable_data(), size_t(pool.size() / pages), runs);
      },
      py::arg("pool").noconvert(), py::arg("pages"), py::arg("runs"),
      "Give the memory of runs [begin, end) of a pool's pages back to the system.");
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side objects of openwork.";
  bind_page_pool(m);
  bind_page_allocator(m);
}
