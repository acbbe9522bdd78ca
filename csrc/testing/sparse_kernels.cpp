#include "testing/sparse_kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/active_gemv/active_gemv.h"
#include "kernels/block_sparse_gemm/block_sparse_gemm.h"
#include "kernels/sparse_gemm/sparse_gemm.h"

namespace py = pybind11;

namespace ow {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Terms = std::optional<Array<float>>;

const float* data_or_null(const Terms& terms) { return terms ? terms->data() : nullptr; }

[[noreturn]] void unknown_kernel(const std::string& kernel) {
  throw std::invalid_argument("unknown kernel " + kernel);
}

// Of a weight [n, k] of float32, uint16 (the bits of bf16) or int8.
ValueType value_type_of(const py::array& weight) {
  switch (weight.itemsize()) {
    case 4: return ValueType::f32;
    case 2: return ValueType::bf16;
    default: return ValueType::i8;
  }
}

struct PackedSparse {
  std::vector<uint64_t> index;  // of either layout: words are aligned as masks must be
  std::vector<int32_t> offsets;
  std::vector<uint8_t> values;
  SparsePattern pattern;

  PackedSparse(const py::array& weight, const Array<uint8_t>& keep, int32_t layout)
      : pattern(sparse_pattern(weight.shape(0), weight.shape(1), Layout(layout))) {
    offsets.resize(size_t(pattern.panels * pattern.k_blocks));
    pattern.offsets = offsets.data();
    const SparsePackArgs pack{pattern.n, pattern.k, value_type_of(weight), weight.data(),
                              keep.data()};
    const int64_t nnz = sparse_offsets_of(pack, pattern, offsets.data(), serial_parallel());
    index.resize(size_t(div_up(index_bytes_of(pattern, nnz), 8)));
    sparse_index_of(pack, pattern, index.data(), serial_parallel());
    set_index(&pattern, index.data());
    // Poisoned padding: a NaN that reaches a result was read as a value.
    values.resize(size_t((nnz + block_size_of(pattern)) * value_size(pack.type)), 0xff);
    sparse_values_of(pack, pattern, values.data(), serial_parallel());
  }
};

template <class Kernel>
std::vector<float> prepared(const Kernel& kernel, const float* x, int64_t m, int64_t k,
                            int64_t k_padded) {
  std::vector<float> out(size_t(sparse_x_count(m, k_padded, kernel.widest)));
  kernel.prepare({x, FloatType::f32, m, k, k_padded, kernel.widest, out.data()}, 0, k_padded);
  return out;
}

void run_sparse_gemm(const std::string& kernel, const Array<float>& x, const py::array& weight,
                     const Array<uint8_t>& keep, const Terms& scales, const Terms& bias,
                     const Terms& add, Array<float> y) {
  const auto run = [&](const SparseGemmKernel& entry, int32_t layout) {
    const PackedSparse w(weight, keep, layout);
    SparseGemmArgs args{};
    args.m = x.shape(0);
    args.w = w.pattern;
    args.values = w.values.data();
    args.value_type = value_type_of(weight);
    args.scales = data_or_null(scales);
    args.bias = data_or_null(bias);
    args.add = data_or_null(add);
    args.y = y.mutable_data();
    const std::vector<float> rows =
        prepared(entry, x.data(), args.m, args.w.k, k_padded_of(args.w));
    args.x = rows.data();
    std::vector<float> tile(size_t(args.w.panels * kSparsePanel * entry.widest));
    entry.run(args, 0, args.w.panels, tile.data());
  };
#define OW_ROW(isa, key, max_m, entry) \
  if (kernel == #entry) return run(entry, key);
  OW_SPARSE_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
  unknown_kernel(kernel);
}

// The gradient as a matrix [n, k], zero where nothing is stored.
Array<float> run_sampled_gemm(const std::string& kernel, const Array<float>& g,
                              const Array<float>& x, const Array<uint8_t>& keep, int32_t layout) {
  Array<float> dense({g.shape(1), x.shape(1)});
  const PackedSparse w(dense, keep, layout);
  std::vector<float> grad(w.values.size() / sizeof(float));
  const auto run = [&](const SampledGemmKernel& entry) {
    const int64_t n_padded = w.pattern.panels * kSparsePanel;
    const std::vector<float> g_rows = prepared(entry, g.data(), g.shape(0), w.pattern.n, n_padded);
    const std::vector<float> x_rows =
        prepared(entry, x.data(), x.shape(0), w.pattern.k, k_padded_of(w.pattern));
    const SampledGemmArgs args{g.shape(0), w.pattern, g_rows.data(), x_rows.data(), grad.data()};
    entry.run(args, 0, w.pattern.panels);
    expand_sparse(w.pattern, ValueType::f32, grad.data(), dense.mutable_data(), serial_parallel());
    return dense;
  };
#define OW_ROW(isa, key, max_m, entry) \
  if (kernel == #entry) return run(entry);
  OW_SAMPLED_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
  unknown_kernel(kernel);
}

void run_block_sparse_gemm(const std::string& kernel, const Array<float>& x,
                           const py::array& weight, int64_t block, const Array<int32_t>& indptr,
                           const Array<int32_t>& indices, const Terms& bias, const Terms& add,
                           Array<float> y) {
  BlockSparseGemmArgs args{};
  args.m = x.shape(0);
  args.n = weight.shape(0);
  args.k = weight.shape(1);
  args.block = block;
  args.row_blocks = div_up(args.n, block);
  args.k_padded = round_up(args.k, block);
  args.indptr = indptr.data();
  args.indices = indices.data();
  args.value_type = weight.itemsize() == 4 ? FloatType::f32 : FloatType::bf16;
  std::vector<uint8_t> values(size_t(indices.size() * block * block * weight.itemsize()));
  compress_blocks(
      {args.n, args.k, block, args.row_blocks, weight.itemsize(), args.indptr, args.indices},
      weight.data(), values.data(), serial_parallel());
  args.values = values.data();
  args.bias = data_or_null(bias);
  args.add = data_or_null(add);
  args.y = y.mutable_data();
  const auto run = [&](const BlockSparseGemmKernel& entry) {
    std::vector<float> tiles;
    for (int64_t first = 0; first < args.m; first += entry.rows) {
      const int64_t used = min_of(entry.rows, args.m - first);
      const int64_t rows = tile_rows(used, entry.rows);
      for (int64_t k = 0; k < args.k_padded; ++k) {
        for (int64_t i = 0; i < rows; ++i) {
          tiles.push_back(i < used && k < args.k ? x.at(first + i, k) : 0.0f);
        }
      }
    }
    args.x = tiles.data();
    entry.run(args, 0, args.row_blocks);
  };
#define OW_ROW(isa, key, max_m, entry) \
  if (kernel == #entry) return run(entry);
  OW_BLOCK_SPARSE_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
  unknown_kernel(kernel);
}

// columns [k, n_padded] of floats (bits 0) or codes [n, k]; scales and zeros [groups, n_padded].
void run_active_gemv(const std::string& kernel, const Array<float>& x, float threshold,
                     const py::array& columns, int bits, int64_t group_size, const Terms& scales,
                     const std::optional<Array<uint8_t>>& zeros, Array<float> y) {
  const int64_t k = x.size();
  ActiveGemvArgs args{};
  args.n = y.size();
  args.n_padded = round_up(args.n, strip_outputs(bits));
  args.groups = div_up(k, group_size);
  args.bits = bits;
  args.type = bits != 0                 ? ColumnType::codes
              : columns.itemsize() == 4 ? ColumnType::f32
                                        : ColumnType::bf16;
  std::vector<uint8_t> packed(size_t(k * args.n_padded * bits / 8));
  args.columns = columns.data();
  if (bits != 0) {
    pack_code_columns({args.n, k, args.n_padded, bits}, static_cast<const uint8_t*>(columns.data()),
                      packed.data(), serial_parallel());
    args.columns = packed.data();
  }
  args.scales = data_or_null(scales);
  args.zeros = zeros ? zeros->data() : nullptr;
  std::vector<int32_t> index(static_cast<size_t>(k));
  std::vector<float> active_x(static_cast<size_t>(k));
  std::vector<int64_t> group_end(size_t(args.groups));
  const int64_t count = find_active(x.data(), FloatType::f32, k, group_size, threshold,
                                    index.data(), active_x.data(), group_end.data());
  args.active = {count, index.data(), active_x.data(), group_end.data()};
  args.y = y.mutable_data();
#define OW_ROW(isa, key, max_m, fn) \
  if (kernel == #fn) return fn(args, 0, args.n_padded);
  OW_ACTIVE_GEMV_KERNELS(OW_ROW)
#undef OW_ROW
  unknown_kernel(kernel);
}

}  // namespace

void bind_sparse_kernels(py::module_& m) {
  m.def("sparse_gemm", &run_sparse_gemm, py::arg("kernel"), py::arg("x"), py::arg("weight"),
        py::arg("keep"), py::arg("scales"), py::arg("bias"), py::arg("add"), py::arg("y"),
        "Writes y [m, n] from the elements of weight [n, k] that keep names.");
  m.def("sampled_gemm", &run_sampled_gemm, py::arg("kernel"), py::arg("g"), py::arg("x"),
        py::arg("keep"), py::arg("layout"), "(g.T @ x) [n, k] where keep, else 0.");
  m.def("block_sparse_gemm", &run_block_sparse_gemm, py::arg("kernel"), py::arg("x"),
        py::arg("weight"), py::arg("block"), py::arg("indptr"), py::arg("indices"), py::arg("bias"),
        py::arg("add"), py::arg("y"), "Writes y [m, n] from the blocks of weight [n, k].");
  m.def("active_gemv", &run_active_gemv, py::arg("kernel"), py::arg("x"), py::arg("threshold"),
        py::arg("columns"), py::arg("bits"), py::arg("group_size"), py::arg("scales"),
        py::arg("zeros"), py::arg("y"),
        "Writes y [n]; columns are floats [k, n_padded], or codes [n, k] if bits is not 0.");
}

}  // namespace ow
