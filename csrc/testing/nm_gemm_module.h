// Binds the nm_gemm kernels.
#pragma once

#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/nm_gemm/nm_gemm.h"
#include "testing/arrays_module.h"

namespace ow {

inline const NmGemmKernels& nm_gemm_kernels(const std::string& kernel) {
#define OW_ROW(isa, key, max_m, kernels) \
  if (kernel == #kernels) return kernels;
  OW_NM_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

// A dense weight and its mask, compressed, as a kernel's arguments.
struct CompressedNm {
  std::vector<uint8_t> values, index, scales;
  NmGemmArgs args{};

  CompressedNm(const py::array& weight, const Array<bool>& mask,
               const std::optional<py::array>& flat_scales, int bits, int kept, int block,
               int vector, int64_t group_size) {
    args.n = weight.shape(0);
    args.k = weight.shape(1);
    args.kept = kept;
    args.block = block;
    args.vector = vector;
    args.bits = bits;
    args.group_size = group_size;
    args.groups = div_up(args.k, group_size);
    const int64_t panels = div_up(args.n, kNmPanel);
    values.resize(size_t(panels * nm_units(args) * nm_unit_value_bytes(bits)));
    index.resize(size_t(div_up(args.n, nm_index_outputs(vector)) * nm_units(args) *
                        nm_unit_index_bytes(block, vector)));
    NmPackArgs pack{
        args.n, args.k, kept, block,         vector,
        bits,   0,      0,    weight.data(), reinterpret_cast<const uint8_t*>(mask.data()),
        nullptr};
    if (flat_scales) {
      pack.groups = args.groups;
      pack.scale_size = flat_scales->itemsize();
      pack.scales = flat_scales->data();
      scales.resize(size_t(panels * args.groups * kNmPanel * pack.scale_size));
      args.scales_type = float_type(*flat_scales, "scales");
    }
    if (find_nm_excess(pack).count != 0) throw std::invalid_argument("mask keeps too much");
    compress_nm(pack, values.data(), index.data(), scales.data(), serial_parallel());
    args.values = values.data();
    args.index = index.data();
    args.scales = flat_scales ? scales.data() : nullptr;
  }
};

inline void nm_gemm_kernel(const std::string& kernel, const py::array& x,
                           const std::optional<Array<float>>& x_scales, const py::array& weight,
                           const Array<bool>& mask, const std::optional<py::array>& scales,
                           int bits, int kept, int block, int vector, int64_t group_size,
                           const std::optional<py::array>& bias,
                           const std::optional<py::array>& add, py::array y) {
  check_contiguous(x, "x");
  check_contiguous(weight, "weight");
  check_contiguous(y, "y");
  CompressedNm compressed(weight, mask, scales, bits, kept, block, vector, group_size);
  NmGemmArgs& args = compressed.args;
  args.m = x.shape(0);
  args.int8 = x_scales.has_value();
  args.x = x.data();
  args.x_scales = x_scales ? x_scales->data() : nullptr;
  args.bias = bias ? bias->data() : nullptr;
  args.add = add ? add->data() : nullptr;
  args.y = y.mutable_data();
  args.y_type = float_type(y, "y");
  const NmGemmKernels& kernels = nm_gemm_kernels(kernel);
  const int64_t bytes = round_up(kernels.laid_bytes(args), 64);
  const std::unique_ptr<void, void (*)(void*)> laid(std::aligned_alloc(64, size_t(bytes)),
                                                    std::free);
  // Poisoned: what `multiply` reads, `lay_out` must have written.
  memset(laid.get(), 0xff, size_t(bytes));
  args.laid = laid.get();
  kernels.lay_out(args, 0, div_up(args.m, kernels.row_block));
  kernels.multiply(args, 0, div_up(args.n, kNmPanel));
}

inline void bind_nm_gemm(py::module_& m) {
  m.def("nm_gemm", &nm_gemm_kernel, py::arg("kernel"), py::arg("x"), py::arg("x_scales"),
        py::arg("weight"), py::arg("mask"), py::arg("scales"), py::arg("bits"), py::arg("kept"),
        py::arg("block"), py::arg("vector"), py::arg("group_size"), py::arg("bias"), py::arg("add"),
        py::arg("y"), "Writes y [m, n]; x is [m, k] of y's type, or int8 codes with x_scales [m].");
}

}  // namespace ow
