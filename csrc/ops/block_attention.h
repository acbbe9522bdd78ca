// Arguments of block attention, for its operator and those that go with it.
#pragma once

#include <cmath>
#include <optional>

#include "ops/key_lists.h"
#include "ops/sequences.h"

namespace ow {

// Which keys a query sees, and of which index.
struct AttentionOptions {
  int64_t block_m, block_n;
  bool causal;
  int64_t window, sinks, min_distance;
  std::optional<double> scale;
};

// What the operators take.
struct AttentionInputs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  IndexTensors index;
  const Tensor* cu_seqlens_q;
  const Tensor* cu_seqlens_k;
  AttentionOptions options;

  float scale() const { return float(options.scale.value_or(1.0 / std::sqrt(double(q.size(3))))); }
};

// Arguments that the operators share: in their schemas, in the functions behind them, and together.
#define OW_ATTENTION_SCHEMA                                                                 \
  "Tensor q, Tensor k, Tensor v, Tensor? indptr, Tensor? indices, Tensor? column_indptr, "  \
  "Tensor? columns, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int block_m, int block_n, " \
  "bool causal, int window, int sinks, int min_distance, float? scale"
#define OW_ATTENTION_PARAMETERS                                                                \
  const Tensor &q, const Tensor &k, const Tensor &v, const std::optional<Tensor>&indptr,       \
      const std::optional<Tensor>&indices, const std::optional<Tensor>&column_indptr,          \
      const std::optional<Tensor>&columns, const std::optional<Tensor>&cu_seqlens_q,           \
      const std::optional<Tensor>&cu_seqlens_k, int64_t block_m, int64_t block_n, bool causal, \
      int64_t window, int64_t sinks, int64_t min_distance, std::optional<double> scale
#define OW_ATTENTION_INPUTS                                                                 \
  AttentionInputs {                                                                         \
    q, k, v, {or_null(indptr), or_null(indices), or_null(column_indptr), or_null(columns)}, \
        or_null(cu_seqlens_q), or_null(cu_seqlens_k), {                                     \
      block_m, block_n, causal, window, sinks, min_distance, scale                          \
    }                                                                                       \
  }

inline void check_values_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_dtype(op, "v", v, q.scalar_type());
  OW_CHECK(v.dim() == 4 && v.size(3) >= 1, op,
           ": v must be [b, sk, kv_heads, dv] with dv at least 1, got ", shape_text(v));
  check_shape(op, "v", v, {k.size(0), k.size(1), k.size(2), v.size(3)});
  check_last_stride(op, "v", v);
}

// All that does not depend on what tensors hold.
inline void check_attention(const char* op, const AttentionInputs& inputs) {
  const auto& [q, k, v, index, cu_seqlens_q, cu_seqlens_k, options] = inputs;
  check_queries_and_keys(op, q, k);
  check_values_of(op, q, k, v);
  for (const auto& [name, value] :
       {std::pair("window", options.window), std::pair("sinks", options.sinks),
        std::pair("min_distance", options.min_distance)}) {
    OW_CHECK(value >= 0, op, ": ", name, " must be at least 0, got ", value);
    OW_CHECK(options.causal || value == 0, op, ": ", name, " must be 0 without causal, got ",
             value);
  }
  OW_CHECK(std::isfinite(inputs.scale()), op, ": scale must be finite, got ", inputs.scale());
  OW_CHECK((cu_seqlens_q == nullptr) == (cu_seqlens_k == nullptr), op,
           ": cu_seqlens_q and cu_seqlens_k must come together, got one");
  check_sequence_pairs(op, q, k, cu_seqlens_q, cu_seqlens_k);
  check_index(op, index, options.block_m, options.block_n, q, k.size(2), cu_seqlens_q != nullptr);
}

inline AttentionMask mask_of(const AttentionOptions& options) {
  // More than any sequence is long means the same, and sums of them stay in range.
  constexpr int64_t kMost = int64_t{1} << 32;
  return {options.causal, min_of(options.window, kMost), min_of(options.sinks, kMost),
          min_of(options.min_distance, kMost)};
}

inline std::vector<AttentionSequence> sequences_of(const Sequences& queries, const Sequences& keys,
                                                   const Tensor& q, const Tensor& k,
                                                   const Tensor& v) {
  std::vector<AttentionSequence> sequences;
  int64_t unit = 0;
  for (int64_t s = 0; s < queries.count; ++s) {
    sequences.push_back({queries.size(s), keys.size(s), queries.begin(s, q.stride(0), q.stride(1)),
                         keys.begin(s, k.stride(0), k.stride(1)),
                         keys.begin(s, v.stride(0), v.stride(1)), queries.begin(s, q.size(1), 1),
                         keys.begin(s, q.size(2) * k.size(1), 1), 0, unit});
    unit += div_up(keys.size(s), kUnitKeys);
  }
  return sequences;
}

// What a call reads; `args` points into `sequences`.
struct AttentionCall {
  std::vector<AttentionSequence> sequences;
  BlockAttentionArgs args;
};

// Of checked inputs; checks what their tensors hold.
inline AttentionCall attention_call(const char* op, const AttentionInputs& inputs) {
  const auto& [q, k, v, index, cu_seqlens_q, cu_seqlens_k, options] = inputs;
  AttentionCall call{};
  BlockAttentionArgs& args = call.args;
  args.heads = q.size(2);
  args.kv_heads = args.kv_end = k.size(2);
  args.d = q.size(3);
  args.dv = v.size(3);
  args.type = float_type(q);
  args.mask = mask_of(options);
  args.scale = inputs.scale();
  const Sequences queries = read_sequences(op, q, "cu_seqlens_q", cu_seqlens_q);
  const Sequences keys = read_sequences(op, k, "cu_seqlens_k", cu_seqlens_k);
  call.sequences = sequences_of(queries, keys, q, k, v);
  args.sequences = call.sequences.data();
  args.sequence_count = int64_t(call.sequences.size());
  read_index(op, index, options.block_m, options.block_n, &call.sequences, &args);
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.q_strides = {q.stride(1), q.stride(2)};
  args.k_strides = {k.stride(1), k.stride(2)};
  args.v_strides = {v.stride(1), v.stride(2)};
  return call;
}

inline void run_block_attention(BlockAttentionArgs* args) {
  const Parallel parallel = torch_parallel();
  const BlockAttentionPlan plan = plan_block_attention(*args, active_isa(), parallel.threads);
  const Workspace workspace(Scratch::bytes_for(plan.packed_bytes) +
                            Scratch::bytes_for(plan.partial_score_count * 4) +
                            plan.tasks * plan.scratch_bytes);
  Scratch scratch = workspace.scratch();
  if (plan.packed_bytes > 0) args->packed = scratch.take<uint8_t>(plan.packed_bytes);
  args->packed_unit_bytes = plan.packed_unit_bytes;
  float* partial =
      args->scores == nullptr ? nullptr : scratch.take<float>(plan.partial_score_count);
  block_attention(*args, plan, scratch.take<uint8_t>(plan.tasks * plan.scratch_bytes), partial,
                  parallel);
}

}  // namespace ow
