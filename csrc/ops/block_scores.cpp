#include "kernels/block_scores/block_scores.h"

#include <tuple>

#include "ops/sequences.h"

namespace ow {
namespace {

Tensor block_means_op(const Tensor& x, const std::optional<Tensor>& cu_seqlens, int64_t block,
                      int64_t max_blocks) {
  constexpr const char* kOp = "block_means";
  check_heads(kOp, "x", x);
  check_range(kOp, "block", block, 1, int64_t{1} << 30);
  const Tensor* offsets = or_null(cu_seqlens);
  check_sequences(kOp, "x", x, "cu_seqlens", offsets);
  check_longest(kOp, "max_blocks", max_blocks, div_up(x.size(1), block), offsets);
  BlockMeansArgs args{};
  args.tokens = read_sequences(kOp, x, "cu_seqlens", offsets);
  const int64_t most = div_up(args.tokens.longest(), block);
  OW_CHECK(max_blocks == most, kOp, ": max_blocks must be that of the longest sequence, ", most,
           ", got ", max_blocks);
  args.heads = x.size(2);
  args.d = x.size(3);
  args.block = block;
  args.max_blocks = max_blocks;
  Tensor means = fast_empty({args.tokens.count, args.heads, max_blocks, args.d}, ScalarType::Float);
  if (means.numel() == 0) return means;
  args.type = float_type(x);
  args.x = x.const_data_ptr();
  args.stride_b = x.stride(0);
  args.stride_token = x.stride(1);
  args.stride_head = x.stride(2);
  args.means = static_cast<float*>(means.mutable_data_ptr());
  block_means(args, active_isa(), torch_parallel());
  return means;
}

std::tuple<Tensor, Tensor> hierarchical_topk(const Tensor& q, const Tensor& k,
                                             const std::optional<Tensor>& cu_seqlens_q,
                                             const std::optional<Tensor>& cu_seqlens_k,
                                             const Tensor& windows, int64_t top, int64_t block_m,
                                             int64_t block_n, int64_t query_stride,
                                             int64_t key_stride, bool smallest, int64_t max_rows,
                                             int64_t max_blocks) {
  constexpr const char* kOp = "hierarchical_topk";
  check_queries_and_keys(kOp, q, k);
  const Tensor* offsets_q = or_null(cu_seqlens_q);
  const Tensor* offsets_k = or_null(cu_seqlens_k);
  check_sequence_pairs(kOp, q, k, offsets_q, offsets_k);
  HipSearchArgs args{};
  args.heads = q.size(2);
  check_operand(kOp, "windows", windows, ScalarType::Int, {args.heads});
  check_range(kOp, "block_m", block_m, 1, 128);
  check_range(kOp, "block_n", block_n, 1, 128);
  check_range(kOp, "top", top, 1, int64_t{1} << 30);
  check_range(kOp, "query_stride", query_stride, 1, block_m);
  check_range(kOp, "key_stride", key_stride, 1, block_n);
  check_longest(kOp, "max_rows", max_rows, div_up(q.size(1), block_m), offsets_q);
  check_longest(kOp, "max_blocks", max_blocks, div_up(k.size(1), block_n), offsets_k);
  args.queries = read_sequences(kOp, q, "cu_seqlens_q", offsets_q);
  args.keys = read_sequences(kOp, k, "cu_seqlens_k", offsets_k);
  const int64_t rows = div_up(args.queries.longest(), block_m);
  const int64_t blocks_of_longest = div_up(args.keys.longest(), block_n);
  OW_CHECK(max_rows == rows && max_blocks == blocks_of_longest, kOp,
           ": max_rows and max_blocks must be those of the longest sequences, ", rows, " and ",
           blocks_of_longest, ", got ", max_rows, " and ", max_blocks);
  Tensor blocks =
      fast_empty({args.queries.count, args.heads, max_rows, max_blocks}, ScalarType::Bool);
  Tensor scored = fast_empty({args.queries.count, args.heads, max_rows}, ScalarType::Int);
  if (scored.numel() == 0) return {blocks, scored};
  args.kv_heads = k.size(2);
  args.d = q.size(3);
  args.block_m = block_m;
  args.block_n = block_n;
  args.k = top;
  args.query_stride = query_stride;
  args.key_stride = key_stride;
  args.max_rows = max_rows;
  args.max_blocks = max_blocks;
  args.type = float_type(q);
  args.sign = smallest ? -1.0f : 1.0f;
  args.q = q.const_data_ptr();
  args.q_stride_b = q.stride(0);
  args.q_stride_token = q.stride(1);
  args.q_stride_head = q.stride(2);
  args.k_data = k.const_data_ptr();
  args.k_stride_b = k.stride(0);
  args.k_stride_token = k.stride(1);
  args.k_stride_head = k.stride(2);
  args.windows = static_cast<const int32_t*>(windows.const_data_ptr());
  args.blocks = static_cast<uint8_t*>(blocks.mutable_data_ptr());
  args.scored = static_cast<int32_t*>(scored.mutable_data_ptr());
  const Parallel parallel = torch_parallel();
  const int64_t samples = hip_search_samples(args);
  const int64_t bytes = hip_search_scratch(args, parallel);
  const Workspace workspace(Scratch::bytes_for(samples * 4) + Scratch::bytes_for(bytes));
  Scratch scratch = workspace.scratch();
  args.sampled = scratch.take<float>(samples);
  args.scratch = scratch.take<uint8_t>(bytes);
  hip_search(args, active_isa(), parallel);
  return {blocks, scored};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def("block_means(Tensor x, Tensor? cu_seqlens, int block, int max_blocks) -> Tensor");
  m.def(
      "hierarchical_topk(Tensor q, Tensor k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor windows, int top, int block_m, int block_n, int query_stride, int key_stride, "
      "bool smallest, int max_rows, int max_blocks) -> (Tensor blocks, Tensor scored)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("block_means", TORCH_BOX(&ow::block_means_op));
  m.impl("hierarchical_topk", TORCH_BOX(&ow::hierarchical_topk));
}
