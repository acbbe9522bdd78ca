#include "kernels/sparse_gemm/sparse_gemm.h"

#include <tuple>

#include "ops/linear.h"

namespace ow {
namespace {

Layout check_sparse_layout(const char* op, int64_t layout) {
  const LayoutInfo* info = layout_info(layout);
  OW_CHECK(info != nullptr && info->family == LayoutFamily::sparse, op,
           ": layout must be bitmask_n16k64@1 or bytes_n16k256@1, got ",
           info == nullptr ? "id " + std::to_string(layout) : std::string(info->text));
  return info->id;
}

ValueType check_value_dtype(const char* op, const char* name, const Tensor& tensor) {
  check_defined(op, name, tensor);
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return ValueType::f32;
    case ScalarType::BFloat16: return ValueType::bf16;
    case ScalarType::Char: return ValueType::i8;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or int8, got ",
           dtype_name(tensor.scalar_type()));
  }
}

// The geometry alone.
SparsePattern check_geometry(const char* op, int64_t layout, int64_t n, int64_t k) {
  const Layout known = check_sparse_layout(op, layout);
  check_weight_size(op, n, k);
  return sparse_pattern(n, k, known);
}

void check_index(const char* op, const char* name, const Tensor& index, const SparsePattern& w,
                 int64_t nnz) {
  if (w.block_k == kMaskK) {
    check_operand(op, name, index, ScalarType::Long, {w.panels, w.k_blocks, kSparsePanel});
  } else {
    check_operand(op, name, index, ScalarType::Byte, {index_bytes_of(w, nnz)});
  }
}

// The pattern of w's geometry that index and offsets are.
SparsePattern check_pattern(const char* op, const Tensor& index, const Tensor& offsets,
                            SparsePattern w, int64_t nnz) {
  check_index(op, "index", index, w, nnz);
  check_operand(op, "offsets", offsets, ScalarType::Int, {w.panels, w.k_blocks});
  set_index(&w, index.const_data_ptr());
  w.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
  return w;
}

// Offsets in 0 .. nnz are all that reading and writing `values` depends on (see the layout).
void check_offsets_inside(const char* op, const SparsePattern& w, int64_t nnz) {
  bool inside = true;
  for (int64_t i = 0; i < w.panels * w.k_blocks; ++i) inside &= uint32_t(w.offsets[i]) <= nnz;
  OW_CHECK(inside, op, ": offsets must be in 0 .. ", nnz, " (nnz), got one outside");
}

void check_nnz(const char* op, int64_t nnz, int64_t n, int64_t k) {
  const int64_t most = min_of(n * k, (int64_t{1} << 31) - 1);
  OW_CHECK(nnz >= 0 && nnz <= most, op, ": nnz must be in 0 .. ", most, ", got ", nnz);
}

// The count of values a tensor of them has before its padding.
int64_t check_values(const char* op, const Tensor& values, const SparsePattern& w) {
  const int64_t padding = block_size_of(w);
  OW_CHECK(values.dim() == 1 && values.size(0) >= padding, op, ": values must be [nnz + ", padding,
           "], got ", shape_text(values));
  check_contiguous(op, "values", values);
  const int64_t nnz = values.size(0) - padding;
  OW_CHECK(nnz < int64_t{1} << 31, op, ": values must be fewer than 2^31, got ", nnz);
  return nnz;
}

Tensor multiply(const char* op, const Tensor& x_any, const Tensor& values, const Tensor* scales,
                const Tensor* bias, const Tensor* add, const SparsePattern& w) {
  Tensor y = linear_result(op, x_any, w.n, bias, add);
  SparseGemmArgs args{};
  args.w = w;
  args.nnz = values.size(0) - block_size_of(w);
  check_offsets_inside(op, w, args.nnz);
  args.m = y.numel() / w.n;
  if (args.m == 0) return y;
  const Tensor x = as_contiguous(x_any);
  args.values = values.const_data_ptr();
  args.value_type = check_value_dtype(op, "values", values);
  args.scales = static_cast<const float*>(const_data(scales));
  args.bias = const_data(bias);
  args.add = const_data(add);
  args.y = y.mutable_data_ptr();
  args.y_type = float_type(x);
  const Parallel parallel = torch_parallel();
  const Isa isa = active_isa();
  const int64_t floats = sparse_gemm_scratch(args, isa, parallel.threads);
  const Workspace workspace(Scratch::bytes_for(floats * 4));
  sparse_gemm(args, x.const_data_ptr(), isa, workspace.scratch().take<float>(floats), parallel);
  return y;
}

Tensor sparse_linear(const Tensor& x, const Tensor& index, const Tensor& offsets,
                     const Tensor& values, const std::optional<Tensor>& scales,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
                     int64_t layout, int64_t n, int64_t k) {
  constexpr const char* kOp = "sparse_linear";
  check_linear_x(kOp, x, k);
  check_value_dtype(kOp, "values", values);
  const SparsePattern size = check_geometry(kOp, layout, n, k);
  const int64_t nnz = check_values(kOp, values, size);
  const SparsePattern w = check_pattern(kOp, index, offsets, size, nnz);
  if (scales.has_value()) check_operand(kOp, "scales", *scales, ScalarType::Float, {n});
  return multiply(kOp, x, values, or_null(scales), or_null(bias), or_null(add), w);
}

// The same with trainable values; its autograd formula (python/openwork/ops/sparse.py) reads the
// transposed weight: t_index, t_offsets, and values[order].
Tensor sparse_linear_train(const Tensor& x, const Tensor& values, const Tensor& index,
                           const Tensor& offsets, const Tensor& t_index, const Tensor& t_offsets,
                           const Tensor& order, int64_t layout, int64_t n, int64_t k) {
  constexpr const char* kOp = "sparse_linear_train";
  check_linear_x(kOp, x, k);
  check_dtype(kOp, "values", values, ScalarType::Float);
  const SparsePattern size = check_geometry(kOp, layout, n, k);
  const int64_t nnz = check_values(kOp, values, size);
  const SparsePattern w = check_pattern(kOp, index, offsets, size, nnz);
  const SparsePattern t = check_geometry(kOp, layout, k, n);
  check_index(kOp, "t_index", t_index, t, nnz);
  check_operand(kOp, "t_offsets", t_offsets, ScalarType::Int, {t.panels, t.k_blocks});
  check_operand(kOp, "order", order, ScalarType::Long, {nnz + block_size_of(t)});
  return multiply(kOp, x, values, nullptr, nullptr, nullptr, w);
}

Tensor sparse_values_grad(const Tensor& g_any, const Tensor& x_any, const Tensor& index,
                          const Tensor& offsets, int64_t nnz, int64_t layout, int64_t n,
                          int64_t k) {
  constexpr const char* kOp = "sparse_values_grad";
  check_linear_x(kOp, x_any, k);
  check_dtype(kOp, "g", g_any, x_any.scalar_type());
  OW_CHECK(g_any.dim() == x_any.dim() && g_any.size(-1) == n, kOp,
           ": g must have the dimensions of x and a last one of n = ", n, ", got ",
           shape_text(g_any));
  for (int64_t d = 0; d + 1 < g_any.dim(); ++d) {
    OW_CHECK(g_any.size(d) == x_any.size(d), kOp, ": g must have the rows of x, ",
             shape_text(x_any), ", got ", shape_text(g_any));
  }
  const SparsePattern size = check_geometry(kOp, layout, n, k);
  check_nnz(kOp, nnz, n, k);
  SampledGemmArgs args{};
  args.w = check_pattern(kOp, index, offsets, size, nnz);
  check_offsets_inside(kOp, args.w, nnz);
  const Tensor g = as_contiguous(g_any);
  const Tensor x = as_contiguous(x_any);
  args.m = g.numel() / n;
  const int64_t count = nnz + block_size_of(size);
  Tensor grad = fast_empty({count}, ScalarType::Float);
  args.grad = static_cast<float*>(grad.mutable_data_ptr());
  memset(args.grad, 0, size_t(count) * sizeof(float));
  if (args.m == 0) return grad;
  const Isa isa = active_isa();
  const int64_t floats = sampled_gemm_scratch(args.m, args.w, isa);
  const Workspace workspace(Scratch::bytes_for(floats * 4));
  sampled_gemm(args, g.const_data_ptr(), x.const_data_ptr(), float_type(x), isa,
               workspace.scratch().take<float>(floats), torch_parallel());
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> compress_sparse_op(const Tensor& weight_any,
                                                      const std::optional<Tensor>& mask_any,
                                                      int64_t nnz, int64_t layout) {
  constexpr const char* kOp = "compress_sparse";
  SparsePackArgs args{};
  args.type = check_value_dtype(kOp, "weight", weight_any);
  OW_CHECK(weight_any.dim() == 2, kOp, ": weight must be [n, k], got ", shape_text(weight_any));
  args.n = weight_any.size(0);
  args.k = weight_any.size(1);
  check_weight_size(kOp, args.n, args.k);
  const Tensor weight = as_contiguous(weight_any);
  args.weight = weight.const_data_ptr();
  std::optional<Tensor> mask;
  if (mask_any.has_value()) {
    check_dtype(kOp, "mask", *mask_any, ScalarType::Bool);
    check_shape(kOp, "mask", *mask_any, {args.n, args.k});
    mask = as_contiguous(*mask_any);
    args.keep = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  check_nnz(kOp, nnz, args.n, args.k);
  SparsePattern w = sparse_pattern(args.n, args.k, check_sparse_layout(kOp, layout));
  Tensor offsets = fast_empty({w.panels, w.k_blocks}, ScalarType::Int);
  w.offsets = static_cast<const int32_t*>(offsets.const_data_ptr());
  const Parallel parallel = torch_parallel();
  const int64_t stored =
      sparse_offsets_of(args, w, static_cast<int32_t*>(offsets.mutable_data_ptr()), parallel);
  OW_CHECK(stored == nnz, kOp, ": nnz must be the number of stored elements, ", stored, ", got ",
           nnz);
  Tensor index = w.block_k == kMaskK
                     ? fast_empty({w.panels, w.k_blocks, kSparsePanel}, ScalarType::Long)
                     : fast_empty({index_bytes_of(w, nnz)}, ScalarType::Byte);
  memset(index.mutable_data_ptr(), 0, size_t(index_bytes_of(w, nnz)));
  sparse_index_of(args, w, index.mutable_data_ptr(), parallel);
  set_index(&w, index.const_data_ptr());
  Tensor values = fast_empty({nnz + block_size_of(w)}, weight.scalar_type());
  const int64_t size = value_size(args.type);
  uint8_t* out = static_cast<uint8_t*>(values.mutable_data_ptr());
  memset(out + nnz * size, 0, size_t(block_size_of(w) * size));
  sparse_values_of(args, w, out, parallel);
  return {index, offsets, values};
}

Tensor expand_sparse_op(const Tensor& index, const Tensor& offsets, const Tensor& values,
                        int64_t layout, int64_t n, int64_t k) {
  constexpr const char* kOp = "expand_sparse";
  const ValueType type = check_value_dtype(kOp, "values", values);
  const SparsePattern size = check_geometry(kOp, layout, n, k);
  const int64_t nnz = check_values(kOp, values, size);
  const SparsePattern w = check_pattern(kOp, index, offsets, size, nnz);
  check_offsets_inside(kOp, w, nnz);
  Tensor weight = fast_empty({n, k}, values.scalar_type());
  expand_sparse(w, type, values.const_data_ptr(), weight.mutable_data_ptr(), torch_parallel());
  return weight;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "sparse_linear(Tensor x, Tensor index, Tensor offsets, Tensor values, Tensor? scales, "
      "Tensor? bias, Tensor? add, int layout, int n, int k) -> Tensor");
  m.def(
      "sparse_linear_train(Tensor x, Tensor values, Tensor index, Tensor offsets, Tensor t_index, "
      "Tensor t_offsets, Tensor order, int layout, int n, int k) -> Tensor");
  m.def(
      "sparse_values_grad(Tensor g, Tensor x, Tensor index, Tensor offsets, int nnz, int layout, "
      "int n, int k) -> Tensor");
  m.def(
      "compress_sparse(Tensor weight, Tensor? mask, int nnz, int layout) -> "
      "(Tensor index, Tensor offsets, Tensor values)");
  m.def(
      "expand_sparse(Tensor index, Tensor offsets, Tensor values, int layout, int n, int k) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&ow::sparse_linear));
  m.impl("sparse_linear_train", TORCH_BOX(&ow::sparse_linear_train));
  m.impl("sparse_values_grad", TORCH_BOX(&ow::sparse_values_grad));
  m.impl("compress_sparse", TORCH_BOX(&ow::compress_sparse_op));
  m.impl("expand_sparse", TORCH_BOX(&ow::expand_sparse_op));
}
