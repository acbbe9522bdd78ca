#include "kernels/block_attention/block_attention.h"

#include <cmath>
#include <tuple>

#include "ops/key_lists.h"

namespace ow {
namespace {

constexpr const char* kOp = "block_attention";

void check_operands(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_float(kOp, "q", q);
  OW_CHECK(q.dim() == 4 && q.size(2) >= 1 && q.size(3) >= 1, kOp,
           ": q must be [b, sq, h, d] with h and d at least 1, got ", shape_text(q));
  check_dtype(kOp, "k", k, q.scalar_type());
  check_dtype(kOp, "v", v, q.scalar_type());
  OW_CHECK(k.dim() == 4, kOp, ": k must be [b, sk, kv_heads, d], got ", shape_text(k));
  const int64_t g = k.size(2);
  check_shape(kOp, "k", k, {q.size(0), k.size(1), g, q.size(3)});
  OW_CHECK(v.dim() == 4 && v.size(3) >= 1, kOp,
           ": v must be [b, sk, kv_heads, dv] with dv at least 1, got ", shape_text(v));
  check_shape(kOp, "v", v, {q.size(0), k.size(1), g, v.size(3)});
  OW_CHECK(g >= 1 && q.size(2) % g == 0, kOp, ": q must have a multiple of kv_heads = ", g,
           " heads, got ", q.size(2));
  // A view that repeats one token may claim any number of them.
  for (const auto& [name, tensor] : {std::pair("q", &q), std::pair("k", &k)}) {
    OW_CHECK(tensor->size(1) < int64_t{1} << 31, kOp, ": ", name,
             " must have fewer than 2^31 tokens, got ", tensor->size(1));
  }
  check_last_stride(kOp, "q", q);
  check_last_stride(kOp, "k", k);
  check_last_stride(kOp, "v", v);
}

AttentionMask mask_of(bool causal, int64_t window, int64_t sinks, int64_t min_distance) {
  for (const auto& [name, value] : {std::pair("window", window), std::pair("sinks", sinks),
                                    std::pair("min_distance", min_distance)}) {
    OW_CHECK(value >= 0, kOp, ": ", name, " must be at least 0, got ", value);
    OW_CHECK(causal || value == 0, kOp, ": ", name, " must be 0 without causal, got ", value);
  }
  // More than any sequence is long means the same, and sums of them stay in range.
  constexpr int64_t kMost = int64_t{1} << 32;
  return {causal, min_of(window, kMost), min_of(sinks, kMost), min_of(min_distance, kMost)};
}

// Offsets of `name` rise from 0 to `tokens`.
const int32_t* check_seqlens(const char* name, const Tensor& seqlens, int64_t count,
                             int64_t tokens) {
  const int32_t* at = static_cast<const int32_t*>(seqlens.const_data_ptr());
  bool rises = at[0] == 0 && at[count] == tokens;
  for (int64_t s = 0; s < count; ++s) rises &= at[s] <= at[s + 1];
  OW_CHECK(rises, kOp, ": ", name, " must rise from 0 to ", tokens, " (tokens), got other values");
  return at;
}

std::vector<AttentionSequence> sequences_of(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor* seqlens_q, const Tensor* seqlens_k) {
  const int64_t b = q.size(0);
  std::vector<AttentionSequence> sequences;
  OW_CHECK((seqlens_q == nullptr) == (seqlens_k == nullptr), kOp,
           ": cu_seqlens_q and cu_seqlens_k must come together, got one");
  if (seqlens_q == nullptr) {
    for (int64_t s = 0; s < b; ++s) {
      sequences.push_back({q.size(1), k.size(1), s * q.stride(0), s * k.stride(0), s * v.stride(0),
                           s * q.size(1), s * q.size(2) * k.size(1), 0, 0});
    }
  } else {
    OW_CHECK(b == 1, kOp, ": q must be one batch with cu_seqlens_q, got ", b);
    check_dtype(kOp, "cu_seqlens_q", *seqlens_q, ScalarType::Int);
    OW_CHECK(seqlens_q->dim() == 1 && seqlens_q->size(0) >= 1, kOp,
             ": cu_seqlens_q must be [sequences + 1], got ", shape_text(*seqlens_q));
    check_contiguous(kOp, "cu_seqlens_q", *seqlens_q);
    check_operand(kOp, "cu_seqlens_k", *seqlens_k, ScalarType::Int, {seqlens_q->size(0)});
    const int64_t count = seqlens_q->size(0) - 1;
    const int32_t* at_q = check_seqlens("cu_seqlens_q", *seqlens_q, count, q.size(1));
    const int32_t* at_k = check_seqlens("cu_seqlens_k", *seqlens_k, count, k.size(1));
    for (int64_t s = 0; s < count; ++s) {
      const int64_t i = at_q[s];
      const int64_t j = at_k[s];
      sequences.push_back({at_q[s + 1] - i, at_k[s + 1] - j, i * q.stride(1), j * k.stride(1),
                           j * v.stride(1), i, j, 0, 0});
    }
  }
  int64_t unit = 0;
  for (AttentionSequence& sequence : sequences) {
    sequence.unit = unit;
    unit += div_up(sequence.keys, kUnitKeys);
  }
  return sequences;
}

void run(BlockAttentionArgs* args) {
  const Parallel parallel = torch_parallel();
  const BlockAttentionPlan plan = plan_block_attention(*args, active_isa(), parallel.threads);
  const Workspace workspace(Scratch::bytes_for(plan.packed_bytes) +
                            Scratch::bytes_for(plan.partial_score_count * 4) +
                            plan.tasks * plan.scratch_bytes);
  Scratch scratch = workspace.scratch();
  args->packed = scratch.take<uint8_t>(plan.packed_bytes);
  args->packed_unit_bytes = plan.packed_unit_bytes;
  float* partial =
      args->scores == nullptr ? nullptr : scratch.take<float>(plan.partial_score_count);
  block_attention(*args, plan, scratch.take<uint8_t>(plan.tasks * plan.scratch_bytes), partial,
                  parallel);
}

std::tuple<Tensor, Tensor, Tensor> block_attention_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& indptr,
    const std::optional<Tensor>& indices, const std::optional<Tensor>& column_indptr,
    const std::optional<Tensor>& columns, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& score_rows,
    int64_t block_m, int64_t block_n, bool causal, int64_t window, int64_t sinks,
    int64_t min_distance, std::optional<double> scale) {
  check_operands(q, k, v);
  const int64_t b = q.size(0);
  const int64_t sq = q.size(1);
  const int64_t h = q.size(2);
  BlockAttentionArgs args{};
  args.heads = h;
  args.kv_heads = k.size(2);
  args.d = q.size(3);
  args.dv = v.size(3);
  args.type = float_type(q);
  args.mask = mask_of(causal, window, sinks, min_distance);
  args.scale = float(scale.value_or(1.0 / std::sqrt(double(args.d))));
  OW_CHECK(std::isfinite(args.scale), kOp, ": scale must be finite, got ", args.scale);
  std::vector<AttentionSequence> sequences =
      sequences_of(q, k, v, or_null(cu_seqlens_q), or_null(cu_seqlens_k));
  args.sequences = sequences.data();
  args.sequence_count = int64_t(sequences.size());
  set_index(kOp, {or_null(indptr), or_null(indices), or_null(column_indptr), or_null(columns)},
            block_m, block_n, &sequences, &args);
  if (score_rows) check_operand(kOp, "score_rows", *score_rows, ScalarType::Bool, {b, sq});

  Tensor o = fast_empty({b, sq, h, args.dv}, q.scalar_type());
  Tensor lse = fast_empty({b, sq, h}, ScalarType::Float);
  const int64_t sk = score_rows ? k.size(1) : 0;
  Tensor scores = fast_empty({b, h, sk}, ScalarType::Float);
  if (scores.numel() > 0) memset(scores.mutable_data_ptr(), 0, size_t(scores.numel()) * 4);
  if (o.numel() == 0) return {o, lse, scores};
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.q_strides = {q.stride(1), q.stride(2)};
  args.k_strides = {k.stride(1), k.stride(2)};
  args.v_strides = {v.stride(1), v.stride(2)};
  args.o = o.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (score_rows && sk > 0) {
    args.score_rows = static_cast<const uint8_t*>(score_rows->const_data_ptr());
    args.scores = static_cast<float*>(scores.mutable_data_ptr());
    args.score_stride = sk;
  }
  run(&args);
  return {o, lse, scores};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "block_attention(Tensor q, Tensor k, Tensor v, Tensor? indptr, Tensor? indices, "
      "Tensor? column_indptr, Tensor? columns, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? score_rows, int block_m, int block_n, bool causal, int window, int sinks, "
      "int min_distance, float? scale) -> (Tensor o, Tensor lse, Tensor scores)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("block_attention", TORCH_BOX(&ow::block_attention_op));
}
