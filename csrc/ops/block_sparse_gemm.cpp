#include "kernels/block_sparse_gemm/block_sparse_gemm.h"

#include <tuple>

#include "ops/linear.h"

namespace ow {
namespace {

Layout layout_of_block(const char* op, int64_t block) {
  switch (block) {
    case 16: return Layout::blocks_n16k16;
    case 32: return Layout::blocks_n32k32;
    case 64: return Layout::blocks_n64k64;
    default: fail(op, ": block must be 16, 32 or 64, got ", block);
  }
}

int64_t block_of_layout(const char* op, int64_t layout) {
  for (const int64_t block : {16, 32, 64}) {
    if (layout == int64_t(layout_of_block(op, block))) return block;
  }
  const LayoutInfo* info = layout_info(layout);
  if (info == nullptr) fail(op, ": layout must be one of blocks, got id ", layout);
  fail(op, ": layout must be one of blocks, got ", info->text);
}

BlockSparsePackArgs check_blocks(const char* op, const Tensor& indptr, const Tensor& indices,
                                 const Tensor& values, int64_t layout, int64_t n, int64_t k) {
  BlockSparsePackArgs w{};
  w.size = value_size(check_value_dtype(op, "values", values));
  w.block = block_of_layout(op, layout);
  check_weight_size(op, n, k);
  w.n = n;
  w.k = k;
  w.row_blocks = div_up(n, w.block);
  check_operand(op, "indptr", indptr, ScalarType::Int, {w.row_blocks + 1});
  check_dtype(op, "indices", indices, ScalarType::Int);
  OW_CHECK(indices.dim() == 1, op, ": indices must be [blocks], got ", shape_text(indices));
  check_contiguous(op, "indices", indices);
  const int64_t blocks = indices.size(0);
  check_shape(op, "values", values, {blocks, w.block, w.block});
  check_contiguous(op, "values", values);
  w.indptr = static_cast<const int32_t*>(indptr.const_data_ptr());
  w.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  return w;
}

// Every read a kernel makes follows from these: indptr rises from 0 to the number of blocks, and
// each index is a column of blocks.
void check_block_lists(const char* op, const BlockSparsePackArgs& w, int64_t blocks) {
  bool rises = w.indptr[0] == 0 && w.indptr[w.row_blocks] == blocks;
  for (int64_t r = 0; r < w.row_blocks; ++r) rises &= w.indptr[r] <= w.indptr[r + 1];
  OW_CHECK(rises, op, ": indptr must rise from 0 to ", blocks, " (blocks), got other values");
  const int64_t columns = div_up(w.k, w.block);
  bool inside = true;
  for (int64_t b = 0; b < blocks; ++b) inside &= uint32_t(w.indices[b]) < columns;
  OW_CHECK(inside, op, ": indices must be in 0 .. ", columns - 1, ", got one outside");
}

Tensor block_sparse_linear(const Tensor& x_any, const Tensor& indptr, const Tensor& indices,
                           const Tensor& values, const std::optional<Tensor>& scales,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
                           int64_t layout, int64_t n, int64_t k) {
  constexpr const char* kOp = "block_sparse_linear";
  check_linear_x(kOp, x_any, k);
  const BlockSparsePackArgs w = check_blocks(kOp, indptr, indices, values, layout, n, k);
  if (scales.has_value()) check_operand(kOp, "scales", *scales, ScalarType::Float, {n});
  Tensor y = linear_result(kOp, x_any, n, or_null(bias), or_null(add));
  check_block_lists(kOp, w, indices.size(0));
  BlockSparseGemmArgs args{};
  args.m = y.numel() / n;
  if (args.m == 0) return y;
  const Tensor x = as_contiguous(x_any);
  args.n = n;
  args.k = k;
  args.block = w.block;
  args.row_blocks = w.row_blocks;
  args.k_padded = round_up(k, w.block);
  args.indptr = w.indptr;
  args.indices = w.indices;
  args.values = values.const_data_ptr();
  args.value_type = check_value_dtype(kOp, "values", values);
  args.scales = static_cast<const float*>(const_data(or_null(scales)));
  args.bias = const_data(or_null(bias));
  args.add = const_data(or_null(add));
  args.y = y.mutable_data_ptr();
  args.y_type = float_type(x);
  const Isa isa = active_isa();
  const int64_t floats = block_sparse_scratch(args, isa);
  const Workspace workspace(Scratch::bytes_for(floats * 4));
  block_sparse_gemm(args, x.const_data_ptr(), isa, workspace.scratch().take<float>(floats),
                    torch_parallel());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> compress_block_sparse(const Tensor& weight_any,
                                                         const Tensor& mask_any, int64_t block,
                                                         int64_t blocks) {
  constexpr const char* kOp = "compress_block_sparse";
  const int64_t size = value_size(check_value_dtype(kOp, "weight", weight_any));
  OW_CHECK(weight_any.dim() == 2, kOp, ": weight must be [n, k], got ", shape_text(weight_any));
  BlockSparsePackArgs w{};
  layout_of_block(kOp, block);
  w.n = weight_any.size(0);
  w.k = weight_any.size(1);
  check_weight_size(kOp, w.n, w.k);
  w.block = block;
  w.row_blocks = div_up(w.n, block);
  const int64_t columns = div_up(w.k, block);
  check_dtype(kOp, "mask", mask_any, ScalarType::Bool);
  check_shape(kOp, "mask", mask_any, {w.row_blocks, columns});
  OW_CHECK(blocks >= 0 && blocks <= w.row_blocks * columns, kOp, ": blocks must be in 0 .. ",
           w.row_blocks * columns, ", got ", blocks);
  const Tensor weight = as_contiguous(weight_any);
  const Tensor mask = as_contiguous(mask_any);
  const uint8_t* keep = static_cast<const uint8_t*>(mask.const_data_ptr());
  int64_t stored = 0;
  for (int64_t i = 0; i < w.row_blocks * columns; ++i) stored += keep[i] != 0;
  OW_CHECK(stored == blocks, kOp, ": blocks must be the number of stored blocks, ", stored,
           ", got ", blocks);
  Tensor indptr = fast_empty({w.row_blocks + 1}, ScalarType::Int);
  Tensor indices = fast_empty({blocks}, ScalarType::Int);
  Tensor values = fast_empty({blocks, block, block}, weight.scalar_type());
  int32_t* begin = static_cast<int32_t*>(indptr.mutable_data_ptr());
  int32_t* index = static_cast<int32_t*>(indices.mutable_data_ptr());
  int32_t count = 0;
  for (int64_t r = 0; r < w.row_blocks; ++r) {
    begin[r] = count;
    for (int64_t c = 0; c < columns; ++c) {
      if (keep[r * columns + c] != 0) index[count++] = int32_t(c);
    }
  }
  begin[w.row_blocks] = count;
  w.indptr = begin;
  w.indices = index;
  w.size = size;
  compress_blocks(w, weight.const_data_ptr(), values.mutable_data_ptr(), torch_parallel());
  return {indptr, indices, values};
}

Tensor expand_block_sparse(const Tensor& indptr, const Tensor& indices, const Tensor& values,
                           int64_t layout, int64_t n, int64_t k) {
  constexpr const char* kOp = "expand_block_sparse";
  const BlockSparsePackArgs w = check_blocks(kOp, indptr, indices, values, layout, n, k);
  check_block_lists(kOp, w, indices.size(0));
  Tensor weight = fast_empty({n, k}, values.scalar_type());
  expand_blocks(w, values.const_data_ptr(), weight.mutable_data_ptr(), torch_parallel());
  return weight;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "block_sparse_linear(Tensor x, Tensor indptr, Tensor indices, Tensor values, Tensor? scales, "
      "Tensor? bias, Tensor? add, int layout, int n, int k) -> Tensor");
  m.def(
      "compress_block_sparse(Tensor weight, Tensor mask, int block, int blocks) -> "
      "(Tensor indptr, Tensor indices, Tensor values)");
  m.def(
      "expand_block_sparse(Tensor indptr, Tensor indices, Tensor values, int layout, int n, "
      "int k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&ow::block_sparse_linear));
  m.impl("compress_block_sparse", TORCH_BOX(&ow::compress_block_sparse));
  m.impl("expand_block_sparse", TORCH_BOX(&ow::expand_block_sparse));
}
