#include "kernels/line_scores/line_scores.h"

#include <tuple>

#include "ops/sequences.h"

namespace ow {
namespace {

std::tuple<Tensor, Tensor> line_scores_op(const Tensor& q, const Tensor& k,
                                          const std::optional<Tensor>& cu_seqlens_q,
                                          const std::optional<Tensor>& cu_seqlens_k,
                                          int64_t max_keys, int64_t probes,
                                          std::optional<double> scale) {
  constexpr const char* kOp = "line_scores";
  check_queries_and_keys(kOp, q, k);
  OW_CHECK(probes >= 1, kOp, ": probes must be at least 1, got ", probes);
  const Tensor* offsets_q = or_null(cu_seqlens_q);
  const Tensor* offsets_k = or_null(cu_seqlens_k);
  check_sequence_pairs(kOp, q, k, offsets_q, offsets_k);
  check_longest(kOp, "max_keys", max_keys, k.size(1), offsets_k);
  LineScoresArgs args{};
  args.queries = read_sequences(kOp, q, "cu_seqlens_q", offsets_q);
  args.keys = read_sequences(kOp, k, "cu_seqlens_k", offsets_k);
  OW_CHECK(max_keys == args.keys.longest(), kOp, ": max_keys must be the longest sequence of k, ",
           args.keys.longest(), ", got ", max_keys);
  args.heads = q.size(2);
  args.kv_heads = k.size(2);
  args.d = q.size(3);
  args.probes = probes;
  args.max_keys = max_keys;
  Tensor columns = fast_empty({args.queries.count, args.heads, max_keys}, ScalarType::Float);
  Tensor diagonals = fast_empty({args.queries.count, args.heads, max_keys}, ScalarType::Float);
  if (columns.numel() == 0) return {columns, diagonals};
  args.type = float_type(q);
  args.scale = float(scale.value_or(1.0 / __builtin_sqrt(double(args.d))));
  args.q = q.const_data_ptr();
  args.q_strides = {q.stride(0), q.stride(1), q.stride(2)};
  args.k = k.const_data_ptr();
  args.k_strides = {k.stride(0), k.stride(1), k.stride(2)};
  args.columns = static_cast<float*>(columns.mutable_data_ptr());
  args.diagonals = static_cast<float*>(diagonals.mutable_data_ptr());
  const Parallel parallel = torch_parallel();
  const int64_t floats = line_scores_scratch(args, parallel);
  const Workspace workspace(Scratch::bytes_for(floats * 4));
  args.scratch = workspace.scratch().take<float>(floats);
  line_scores(args, active_isa(), parallel);
  return {columns, diagonals};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "line_scores(Tensor q, Tensor k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_keys, "
      "int probes, float? scale) -> (Tensor columns, Tensor diagonals)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("line_scores", TORCH_BOX(&ow::line_scores_op));
}
