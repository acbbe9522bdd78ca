#include "kernels/merge_states/merge_states.h"

#include <tuple>

#include "ops/glue.h"

namespace ow {
namespace {

// lse must be o without its last dimension.
void check_lse(const char* op, const char* name, const Tensor& lse, const Tensor& o) {
  check_dtype(op, name, lse, ScalarType::Float);
  bool same = lse.dim() == o.dim() - 1;
  for (int64_t i = 0; same && i < lse.dim(); ++i) same = lse.size(i) == o.size(i);
  OW_CHECK(same, op, ": ", name, " must have the shape of o1 without its last dimension, got ",
           shape_text(lse));
}

std::tuple<Tensor, Tensor> merge_states_op(const Tensor& o1_any, const Tensor& lse1_any,
                                           const Tensor& o2_any, const Tensor& lse2_any) {
  constexpr const char* kOp = "merge_states";
  check_float(kOp, "o1", o1_any);
  OW_CHECK(o1_any.dim() >= 1 && o1_any.dim() <= kMaxDim, kOp, ": o1 must have 1 .. ", kMaxDim,
           " dimensions, got ", o1_any.dim());
  check_dtype(kOp, "o2", o2_any, o1_any.scalar_type());
  OW_CHECK(same_shape(o1_any, o2_any), kOp, ": o2 must have the shape of o1, ", shape_text(o1_any),
           ", got ", shape_text(o2_any));
  check_lse(kOp, "lse1", lse1_any, o1_any);
  check_lse(kOp, "lse2", lse2_any, o1_any);
  const Tensor o1 = as_contiguous(o1_any);
  const Tensor lse1 = as_contiguous(lse1_any);
  const Tensor o2 = as_contiguous(o2_any);
  const Tensor lse2 = as_contiguous(lse2_any);
  int64_t sizes[kMaxDim];
  for (int64_t i = 0; i < o1.dim(); ++i) sizes[i] = o1.size(i);
  Tensor o = fast_empty(sizes, o1.dim(), o1.scalar_type());
  Tensor lse = fast_empty(sizes, o1.dim() - 1, ScalarType::Float);
  if (lse.numel() == 0) return {o, lse};
  const MergeStatesArgs args{lse.numel(),
                             o1.size(o1.dim() - 1),
                             float_type(o1),
                             o1.const_data_ptr(),
                             static_cast<const float*>(lse1.const_data_ptr()),
                             o2.const_data_ptr(),
                             static_cast<const float*>(lse2.const_data_ptr()),
                             o.mutable_data_ptr(),
                             static_cast<float*>(lse.mutable_data_ptr())};
  merge_states(args, active_isa(), torch_parallel());
  return {o, lse};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def("merge_states(Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) -> (Tensor o, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&ow::merge_states_op));
}
