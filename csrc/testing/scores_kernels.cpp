#include "testing/scores_kernels.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/block_index/block_index.h"
#include "kernels/block_scores/block_scores.h"
#include "kernels/line_scores/line_scores.h"
#include "testing/arrays_module.h"

namespace ow {
namespace {

LineScoresFn line_scores_fn(const std::string& kernel) {
#define OW_ROW(isa, key, max_m, fn) \
  if (kernel == #fn) return fn;
  OW_LINE_SCORES_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

const BlockScoresKernels& block_scores_kernels(const std::string& kernel) {
#define OW_ROW(isa, key, max_m, kernels) \
  if (kernel == #kernels) return kernels;
  OW_BLOCK_SCORES_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

// q [sq, d] and k [sk, d] of one head: (columns, diagonals) [sk].
std::tuple<Array<float>, Array<float>> line_scores_kernel(const std::string& kernel,
                                                          const py::array& q, const py::array& k,
                                                          int64_t probes, float scale) {
  for (const auto& array : {q, k}) check_contiguous(array, "operands");
  LineScoresArgs args{};
  args.heads = args.kv_heads = 1;
  args.d = q.shape(1);
  args.probes = probes;
  args.queries = {nullptr, 1, q.shape(0)};
  args.keys = {nullptr, 1, k.shape(0)};
  args.type = float_type(q, "q");
  args.scale = scale;
  args.q = q.data();
  args.q_strides = {q.size(), args.d, args.d};
  args.k = k.data();
  args.k_strides = {k.size(), args.d, args.d};
  args.max_keys = k.shape(0);
  Array<float> columns(k.shape(0)), diagonals(k.shape(0));
  args.columns = columns.mutable_data();
  args.diagonals = diagonals.mutable_data();
  // Poisoned: what a kernel reads of it, it must have written.
  std::vector<float> scratch(size_t(scratch_of_task(args)) + 16, bits_to_float(0x7fc00000));
  float* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) / 4;
  line_scores_fn(kernel)(args, aligned, 0, 1);
  return {columns, diagonals};
}

Array<float> block_means_kernel(const std::string& kernel, const py::array& x, int64_t block) {
  check_contiguous(x, "x");
  BlockMeansArgs args{};
  args.heads = 1;
  args.d = x.shape(1);
  args.block = block;
  args.max_blocks = div_up(x.shape(0), block);
  args.tokens = {nullptr, 1, x.shape(0)};
  args.type = float_type(x, "x");
  args.x = x.data();
  args.stride_b = x.size();
  args.stride_token = args.stride_head = args.d;
  Array<float> means({args.max_blocks, args.d});
  args.means = means.mutable_data();
  block_scores_kernels(kernel).means(args, 0, args.max_blocks);
  return means;
}

// Scores of all blocks of k [sk, d] for the one row of queries q [sq, d].
Array<float> block_scores_kernel(const std::string& kernel, const py::array& q, const py::array& k,
                                 int64_t block_n, int64_t query_stride, int64_t key_stride,
                                 bool smallest) {
  for (const auto& array : {q, k}) check_contiguous(array, "operands");
  const BlockScoresKernels& kernels = block_scores_kernels(kernel);
  HipSearchArgs args{};
  args.heads = args.kv_heads = 1;
  args.d = q.shape(1);
  args.block_m = q.shape(0);
  args.block_n = block_n;
  args.query_stride = query_stride;
  args.key_stride = key_stride;
  args.max_rows = 1;
  args.max_blocks = div_up(k.shape(0), block_n);
  args.queries = {nullptr, 1, q.shape(0)};
  args.keys = {nullptr, 1, k.shape(0)};
  args.type = float_type(q, "q");
  args.sign = smallest ? -1.0f : 1.0f;
  args.q = q.data();
  args.q_stride_b = q.size();
  args.q_stride_token = args.q_stride_head = args.d;
  args.k_data = k.data();
  args.k_stride_b = k.size();
  args.k_stride_token = args.k_stride_head = args.d;
  std::vector<float> sampled(size_t(hip_search_samples(args)), bits_to_float(0x7fc00000));
  args.sampled = sampled.data();
  kernels.sample(args, 0, args.max_blocks);
  const int64_t queries = div_up(args.block_m, query_stride);
  const int64_t lanes = round_up(queries, 16);  // as many as the widest vector has
  std::vector<float> packed(size_t(args.d * lanes), bits_to_float(0x7fc00000));
  const SearchRow row{q.data(), sampled.data(), queries, lanes, packed.data()};
  kernels.pack(args, row);
  std::vector<int32_t> blocks(size_t(args.max_blocks));
  std::iota(blocks.begin(), blocks.end(), 0);
  Array<float> scores(args.max_blocks);
  kernels.score(args, row, blocks.data(), args.max_blocks, scores.mutable_data());
  return scores;
}

using Marks = std::optional<Array<uint8_t>>;
const uint8_t* data_or_null(const Marks& marks) { return marks ? marks->data() : nullptr; }

// One sequence and head: for each row its blocks and its single columns.
std::vector<std::tuple<std::vector<int32_t>, std::vector<int32_t>>> block_index_of(
    int64_t queries, int64_t keys, int64_t block_m, int64_t block_n, const Marks& blocks,
    const Marks& columns, const Marks& slashes, int32_t window, int32_t sinks, bool causal) {
  BlockIndexArgs args{};
  args.heads = 1;
  args.causal = causal;
  args.block_m = block_m;
  args.block_n = block_n;
  args.rows = args.max_rows = div_up(queries, block_m);
  args.queries = {nullptr, 1, queries};
  args.keys = {nullptr, 1, keys};
  args.blocks = data_or_null(blocks);
  args.columns = data_or_null(columns);
  args.slashes = data_or_null(slashes);
  args.max_keys = keys;
  args.max_blocks = div_up(keys, block_n);
  args.windows = &window;
  args.sinks = &sinks;
  std::vector<int32_t> column_scratch(size_t(block_index_scratch(args)));
  std::vector<int32_t> slash_scratch(column_scratch.size());
  args.column_counts = column_scratch.data();
  args.slash_counts = slash_scratch.data();
  std::vector<int32_t> counts(size_t(args.rows)), column_counts(size_t(args.rows));
  count_lists(args, counts.data(), column_counts.data(), serial_parallel());
  std::vector<int32_t> indptr{0}, column_indptr{0};
  for (size_t r = 0; r < counts.size(); ++r) {
    indptr.push_back(indptr.back() + counts[r]);
    column_indptr.push_back(column_indptr.back() + column_counts[r]);
  }
  std::vector<int32_t> indices(size_t(indptr.back())), singles(size_t(column_indptr.back()));
  fill_lists(args, indptr.data(), column_indptr.data(), indices.data(), singles.data(),
             serial_parallel());
  std::vector<std::tuple<std::vector<int32_t>, std::vector<int32_t>>> rows;
  for (size_t r = 0; r < counts.size(); ++r) {
    rows.emplace_back(
        std::vector<int32_t>(indices.begin() + indptr[r], indices.begin() + indptr[r + 1]),
        std::vector<int32_t>(singles.begin() + column_indptr[r],
                             singles.begin() + column_indptr[r + 1]));
  }
  return rows;
}

Array<uint8_t> largest(const Array<float>& scores, const Array<float>& budgets, bool by_mass) {
  Array<uint8_t> marks({scores.shape(0), scores.shape(1)});
  largest_elements({scores.shape(0), scores.shape(1), by_mass, scores.data(), budgets.data(),
                    marks.mutable_data()},
                   serial_parallel());
  return marks;
}

}  // namespace

void bind_scores_kernels(py::module_& m) {
  m.def("line_scores", &line_scores_kernel, py::arg("kernel"), py::arg("q"), py::arg("k"),
        py::arg("probes"), py::arg("scale"), "(columns, diagonals) of one head, [keys] each.");
  m.def("block_means", &block_means_kernel, py::arg("kernel"), py::arg("x"), py::arg("block"),
        "Means of blocks of x [n, d].");
  m.def("block_scores", &block_scores_kernel, py::arg("kernel"), py::arg("q"), py::arg("k"),
        py::arg("block_n"), py::arg("query_stride"), py::arg("key_stride"), py::arg("smallest"),
        "The tree search's scores of all blocks of k [n, d] for one block of queries.");
  m.def("block_index", &block_index_of, py::arg("queries"), py::arg("keys"), py::arg("block_m"),
        py::arg("block_n"), py::arg("blocks"), py::arg("columns"), py::arg("slashes"),
        py::arg("window"), py::arg("sinks"), py::arg("causal") = true,
        "(blocks, columns) of each row of one head.");
  m.def("largest", &largest, py::arg("scores"), py::arg("budgets"), py::arg("by_mass"),
        "Marks [rows, n].");
}

}  // namespace ow
