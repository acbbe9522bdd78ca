#include <tuple>

#include "ops/block_attention.h"

namespace ow {
namespace {

std::tuple<Tensor, Tensor> block_attention_train(OW_ATTENTION_PARAMETERS) {
  constexpr const char* kOp = "block_attention_train";
  const AttentionInputs inputs = OW_ATTENTION_INPUTS;
  check_attention(kOp, inputs);
  AttentionCall call = attention_call(kOp, inputs);
  const int64_t b = q.size(0);
  const int64_t sq = q.size(1);
  Tensor o = fast_empty({b, sq, call.args.heads, call.args.dv}, q.scalar_type());
  Tensor lse = fast_empty({b, sq, call.args.heads}, ScalarType::Float);
  if (o.numel() == 0) return {o, lse};
  call.args.o = o.mutable_data_ptr();
  call.args.lse = static_cast<float*>(lse.mutable_data_ptr());
  run_block_attention(&call.args);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> block_attention_backward_op(const Tensor& grad_o_any,
                                                               const Tensor& grad_lse_any,
                                                               const Tensor& o, const Tensor& lse,
                                                               OW_ATTENTION_PARAMETERS) {
  constexpr const char* kOp = "block_attention_backward";
  const AttentionInputs inputs = OW_ATTENTION_INPUTS;
  check_attention(kOp, inputs);
  const int64_t b = q.size(0);
  const int64_t sq = q.size(1);
  check_operand(kOp, "o", o, q.scalar_type(), {b, sq, q.size(2), v.size(3)});
  check_operand(kOp, "lse", lse, ScalarType::Float, {b, sq, q.size(2)});
  check_dtype(kOp, "grad_o", grad_o_any, q.scalar_type());
  check_shape(kOp, "grad_o", grad_o_any, {b, sq, q.size(2), v.size(3)});
  check_dtype(kOp, "grad_lse", grad_lse_any, ScalarType::Float);
  check_shape(kOp, "grad_lse", grad_lse_any, {b, sq, q.size(2)});
  AttentionCall call = attention_call(kOp, inputs);
  BlockAttentionArgs& a = call.args;
  Tensor grad_q = fast_empty({b, sq, a.heads, a.d}, q.scalar_type());
  Tensor grad_k = fast_empty({b, k.size(1), a.kv_heads, a.d}, q.scalar_type());
  Tensor grad_v = fast_empty({b, k.size(1), a.kv_heads, a.dv}, q.scalar_type());
  if (b == 0) return {grad_q, grad_k, grad_v};
  const Tensor grad_o = as_contiguous(grad_o_any);
  const Tensor grad_lse = as_contiguous(grad_lse_any);
  a.o = const_cast<void*>(o.const_data_ptr());
  a.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  const Parallel parallel = torch_parallel();
  const BlockAttentionBackwardPlan plan =
      plan_block_attention_backward(a, active_isa(), parallel.threads);
  const Workspace workspace(Scratch::bytes_for(plan.packed_bytes) +
                            Scratch::bytes_for(plan.sum_count * 4) +
                            plan.tasks * plan.scratch_bytes);
  Scratch scratch = workspace.scratch();
  a.packed = scratch.take<uint8_t>(plan.packed_bytes);
  a.packed_unit_bytes = plan.packed_unit_bytes;
  float* sums = scratch.take<float>(plan.sum_count);
  const BlockAttentionBackwardArgs args{a,
                                        grad_o.const_data_ptr(),
                                        static_cast<const float*>(grad_lse.const_data_ptr()),
                                        grad_q.mutable_data_ptr(),
                                        grad_k.mutable_data_ptr(),
                                        grad_v.mutable_data_ptr()};
  block_attention_backward(args, plan, scratch.take<uint8_t>(plan.tasks * plan.scratch_bytes), sums,
                           parallel);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def("block_attention_train(" OW_ATTENTION_SCHEMA ") -> (Tensor o, Tensor lse)");
  m.def(
      "block_attention_backward(Tensor grad_o, Tensor grad_lse, Tensor o, Tensor "
      "lse, " OW_ATTENTION_SCHEMA ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("block_attention_train", TORCH_BOX(&ow::block_attention_train));
  m.impl("block_attention_backward", TORCH_BOX(&ow::block_attention_backward_op));
}
