#include "kernels/block_attention/block_attention.h"

#include <tuple>

#include "ops/block_attention.h"

namespace ow {
namespace {

constexpr const char* kOp = "block_attention";

std::tuple<Tensor, Tensor, Tensor> block_attention_op(OW_ATTENTION_PARAMETERS,
                                                      const std::optional<Tensor>& score_rows) {
  const AttentionInputs inputs = OW_ATTENTION_INPUTS;
  check_attention(kOp, inputs);
  const int64_t b = q.size(0);
  const int64_t sq = q.size(1);
  const int64_t h = q.size(2);
  if (score_rows) check_operand(kOp, "score_rows", *score_rows, ScalarType::Bool, {b, sq});
  AttentionCall call = attention_call(kOp, inputs);
  BlockAttentionArgs& args = call.args;

  Tensor o = fast_empty({b, sq, h, args.dv}, q.scalar_type());
  Tensor lse = fast_empty({b, sq, h}, ScalarType::Float);
  const int64_t sk = score_rows ? k.size(1) : 0;
  Tensor scores = fast_empty({b, h, sk}, ScalarType::Float);
  if (scores.numel() > 0) memset(scores.mutable_data_ptr(), 0, size_t(scores.numel()) * 4);
  if (o.numel() == 0) return {o, lse, scores};
  args.o = o.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (score_rows && sk > 0) {
    args.score_rows = static_cast<const uint8_t*>(score_rows->const_data_ptr());
    args.scores = static_cast<float*>(scores.mutable_data_ptr());
    args.score_stride = sk;
  }
  run_block_attention(&args);
  return {o, lse, scores};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def("block_attention(" OW_ATTENTION_SCHEMA
        ", Tensor? score_rows) -> (Tensor o, Tensor lse, Tensor scores)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("block_attention", TORCH_BOX(&ow::block_attention_op));
}
