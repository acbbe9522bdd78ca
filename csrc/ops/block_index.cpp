#include "kernels/block_index/block_index.h"

#include <optional>
#include <tuple>

#include "ops/sequences.h"

namespace ow {
namespace {

void check_block(const char* op, const char* name, int64_t block) {
  OW_CHECK(block >= 16 && block <= 128 && block % 16 == 0, op, ": ", name,
           " must be a multiple of 16 in 16 .. 128, got ", block);
}

constexpr int64_t kMostItems = (int64_t{1} << 31) - 1;

// What is listed.
struct IndexInputs {
  const Tensor& cu_seqlens_q;
  const Tensor& cu_seqlens_k;
  const std::optional<Tensor>& blocks;
  const std::optional<Tensor>& columns;
  const std::optional<Tensor>& slashes;
  const Tensor& windows;
  const Tensor& sinks;
  bool causal;
  int64_t block_m, block_n, rows;
};

// Marks [sequences, heads, ...] of `dims` dimensions. The others are those of the longest sequence.
void check_marks(const char* op, const char* name, const std::optional<Tensor>& marks, int64_t dims,
                 const BlockIndexArgs& a) {
  if (!marks.has_value()) return;
  check_dtype(op, name, *marks, ScalarType::Bool);
  OW_CHECK(marks->dim() == dims && marks->size(0) == a.queries.count && marks->size(1) == a.heads,
           op, ": ", name, " must be [", a.queries.count, ", ", a.heads,
           ", ...] (sequences, heads)", " of ", dims, " dimensions, got ", shape_text(*marks));
  check_contiguous(op, name, *marks);
}

// Marks are read as bytes that are 0 or not.
template <size_t N>
const uint8_t* read_marks(const char* op, const char* name, const std::optional<Tensor>& marks,
                          const int64_t (&shape)[N]) {
  if (!marks.has_value()) return nullptr;
  check_shape(op, name, *marks, shape);
  return static_cast<const uint8_t*>(marks->const_data_ptr());
}

// All that does not depend on what tensors hold.
BlockIndexArgs check_index(const char* op, const IndexInputs& inputs) {
  const auto& [cu_seqlens_q, cu_seqlens_k, blocks, columns, slashes, windows, sinks, causal,
               block_m, block_n, rows] = inputs;
  BlockIndexArgs a{};
  check_block(op, "block_m", block_m);
  check_block(op, "block_n", block_n);
  a.block_m = block_m;
  a.block_n = block_n;
  a.causal = causal;
  a.queries.count = check_offsets(op, "cu_seqlens_q", cu_seqlens_q);
  a.keys.count = check_offsets(op, "cu_seqlens_k", cu_seqlens_k);
  check_same_count(op, a.queries.count, a.keys.count);
  check_dtype(op, "windows", windows, ScalarType::Int);
  OW_CHECK(windows.dim() == 1 && windows.size(0) >= 1, op, ": windows must be [heads], got ",
           shape_text(windows));
  a.heads = windows.size(0);
  check_contiguous(op, "windows", windows);
  check_operand(op, "sinks", sinks, ScalarType::Int, {a.heads});
  a.windows = static_cast<const int32_t*>(windows.const_data_ptr());
  a.sinks = static_cast<const int32_t*>(sinks.const_data_ptr());
  check_marks(op, "blocks", blocks, 4, a);
  check_marks(op, "columns", columns, 3, a);
  check_marks(op, "slashes", slashes, 3, a);
  check_range(op, "rows", rows, 0, kMostItems);
  return a;
}

// What follows from the offsets of sequences.
void read_index(const char* op, const IndexInputs& inputs, BlockIndexArgs* a) {
  a->queries = read_offsets(op, "cu_seqlens_q", inputs.cu_seqlens_q);
  a->keys = read_offsets(op, "cu_seqlens_k", inputs.cu_seqlens_k);
  const int64_t sequences = a->queries.count;
  a->max_rows = div_up(a->queries.longest(), a->block_m);
  a->max_keys = a->keys.longest();
  a->max_blocks = div_up(a->max_keys, a->block_n);
  for (int64_t s = 0; s < sequences; ++s) a->rows += div_up(a->queries.size(s), a->block_m);
  OW_CHECK(inputs.rows == a->rows, op, ": rows must be the ", a->rows, " blocks of queries, got ",
           inputs.rows);
  a->blocks =
      read_marks(op, "blocks", inputs.blocks, {sequences, a->heads, a->max_rows, a->max_blocks});
  a->columns = read_marks(op, "columns", inputs.columns, {sequences, a->heads, a->max_keys});
  a->slashes = read_marks(op, "slashes", inputs.slashes, {sequences, a->heads, a->max_keys});
}

// Room for the running counts of marks, which must outlive the call.
Tensor scratch_of(BlockIndexArgs* a) {
  Tensor counts = fast_empty({2, block_index_scratch(*a)}, ScalarType::Int);
  a->column_counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  a->slash_counts = a->column_counts + block_index_scratch(*a);
  return counts;
}

// Offsets [heads, rows + 1] of lists of these lengths, one head behind another.
Tensor offsets_of(const char* op, const char* what, const BlockIndexArgs& a,
                  const int32_t* counts) {
  Tensor result = fast_empty({a.heads, a.rows + 1}, ScalarType::Int);
  int32_t* indptr = static_cast<int32_t*>(result.mutable_data_ptr());
  int64_t total = 0;
  for (int64_t head = 0; head < a.heads; ++head) {
    *indptr++ = int32_t(total);
    for (int64_t r = 0; r < a.rows; ++r) {
      total += *counts++;
      OW_CHECK(total < int64_t{1} << 31, op, ": there must be fewer than 2^31 listed ", what,
               ", got more");
      *indptr++ = int32_t(total);
    }
  }
  return result;
}

std::tuple<Tensor, Tensor> count_all(const char* op, const BlockIndexArgs& a) {
  const int64_t lists = a.heads * a.rows;
  const Workspace workspace(2 * Scratch::bytes_for(lists * 4));
  Scratch scratch = workspace.scratch();
  int32_t* blocks = scratch.take<int32_t>(lists);
  int32_t* columns = scratch.take<int32_t>(lists);
  count_lists(a, blocks, columns, torch_parallel());
  return {offsets_of(op, "blocks", a, blocks), offsets_of(op, "columns", a, columns)};
}

std::tuple<Tensor, Tensor> block_index_offsets(
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const std::optional<Tensor>& blocks,
    const std::optional<Tensor>& columns, const std::optional<Tensor>& slashes,
    const Tensor& windows, const Tensor& sinks, bool causal, int64_t block_m, int64_t block_n,
    int64_t rows) {
  constexpr const char* kOp = "block_index_offsets";
  const IndexInputs inputs{cu_seqlens_q, cu_seqlens_k, blocks,  columns, slashes, windows,
                           sinks,        causal,       block_m, block_n, rows};
  BlockIndexArgs a = check_index(kOp, inputs);
  read_index(kOp, inputs, &a);
  const Tensor scratch = scratch_of(&a);
  return count_all(kOp, a);
}

bool same_numbers(const Tensor& a, const Tensor& b) {
  return memcmp(a.const_data_ptr(), b.const_data_ptr(), size_t(a.numel()) * 4) == 0;
}

std::tuple<Tensor, Tensor> block_index_lists(
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const std::optional<Tensor>& blocks,
    const std::optional<Tensor>& columns, const std::optional<Tensor>& slashes,
    const Tensor& windows, const Tensor& sinks, bool causal, int64_t block_m, int64_t block_n,
    int64_t rows, const Tensor& indptr, const Tensor& column_indptr, int64_t nnz,
    int64_t column_nnz) {
  constexpr const char* kOp = "block_index_lists";
  const IndexInputs inputs{cu_seqlens_q, cu_seqlens_k, blocks,  columns, slashes, windows,
                           sinks,        causal,       block_m, block_n, rows};
  BlockIndexArgs a = check_index(kOp, inputs);
  check_operand(kOp, "indptr", indptr, ScalarType::Int, {a.heads, rows + 1});
  check_operand(kOp, "column_indptr", column_indptr, ScalarType::Int, {a.heads, rows + 1});
  check_range(kOp, "nnz", nnz, 0, kMostItems);
  check_range(kOp, "column_nnz", column_nnz, 0, kMostItems);
  read_index(kOp, inputs, &a);
  const Tensor scratch = scratch_of(&a);
  const auto [block_offsets, column_offsets] = count_all(kOp, a);
  OW_CHECK(same_numbers(indptr, block_offsets) && same_numbers(column_indptr, column_offsets), kOp,
           ": indptr must be that of block_index_offsets, got other values");
  const auto last = [&](const Tensor& offsets) {
    return int64_t(static_cast<const int32_t*>(offsets.const_data_ptr())[offsets.numel() - 1]);
  };
  OW_CHECK(nnz == last(indptr), kOp, ": nnz must be the last of indptr, ", last(indptr), ", got ",
           nnz);
  OW_CHECK(column_nnz == last(column_indptr), kOp,
           ": column_nnz must be the last of column_indptr, ", last(column_indptr), ", got ",
           column_nnz);
  Tensor indices = fast_empty({nnz}, ScalarType::Int);
  Tensor singles = fast_empty({column_nnz}, ScalarType::Int);
  fill_lists(a, static_cast<const int32_t*>(indptr.const_data_ptr()),
             static_cast<const int32_t*>(column_indptr.const_data_ptr()),
             static_cast<int32_t*>(indices.mutable_data_ptr()),
             static_cast<int32_t*>(singles.mutable_data_ptr()), torch_parallel());
  return {indices, singles};
}

Tensor largest(const Tensor& scores_any, const Tensor& budgets, bool by_mass) {
  constexpr const char* kOp = "largest";
  check_dtype(kOp, "scores", scores_any, ScalarType::Float);
  OW_CHECK(scores_any.dim() == 2, kOp, ": scores must be [rows, n], got ", shape_text(scores_any));
  LargestArgs args{};
  args.rows = scores_any.size(0);
  args.n = scores_any.size(1);
  check_operand(kOp, "budgets", budgets, ScalarType::Float, {args.rows});
  Tensor marks = fast_empty({args.rows, args.n}, ScalarType::Bool);
  if (marks.numel() == 0) return marks;
  const Tensor scores = as_contiguous(scores_any);
  args.by_mass = by_mass;
  args.scores = static_cast<const float*>(scores.const_data_ptr());
  args.budgets = static_cast<const float*>(budgets.const_data_ptr());
  args.marks = static_cast<uint8_t*>(marks.mutable_data_ptr());
  largest_elements(args, torch_parallel());
  return marks;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "block_index_offsets(Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? blocks, "
      "Tensor? columns, Tensor? slashes, Tensor windows, Tensor sinks, bool causal, int block_m, "
      "int block_n, "
      "int rows) -> (Tensor indptr, Tensor column_indptr)");
  m.def(
      "block_index_lists(Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? blocks, "
      "Tensor? columns, Tensor? slashes, Tensor windows, Tensor sinks, bool causal, int block_m, "
      "int block_n, "
      "int rows, Tensor indptr, Tensor column_indptr, int nnz, int column_nnz) -> "
      "(Tensor indices, Tensor columns)");
  m.def("largest(Tensor scores, Tensor budgets, bool by_mass) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("block_index_offsets", TORCH_BOX(&ow::block_index_offsets));
  m.impl("block_index_lists", TORCH_BOX(&ow::block_index_lists));
  m.impl("largest", TORCH_BOX(&ow::largest));
}
