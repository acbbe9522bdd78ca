// Arguments of block attention, for its operator and those that go with it.
#pragma once

#include <cmath>
#include <optional>

#include "ops/key_lists.h"

namespace ow {

inline void check_operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_float(op, "q", q);
  OW_CHECK(q.dim() == 4 && q.size(2) >= 1 && q.size(3) >= 1, op,
           ": q must be [b, sq, h, d] with h and d at least 1, got ", shape_text(q));
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
  OW_CHECK(k.dim() == 4, op, ": k must be [b, sk, kv_heads, d], got ", shape_text(k));
  const int64_t g = k.size(2);
  check_shape(op, "k", k, {q.size(0), k.size(1), g, q.size(3)});
  OW_CHECK(v.dim() == 4 && v.size(3) >= 1, op,
           ": v must be [b, sk, kv_heads, dv] with dv at least 1, got ", shape_text(v));
  check_shape(op, "v", v, {q.size(0), k.size(1), g, v.size(3)});
  OW_CHECK(g >= 1 && q.size(2) % g == 0, op, ": q must have a multiple of kv_heads = ", g,
           " heads, got ", q.size(2));
  // A view that repeats one token may claim any number of them.
  for (const auto& [name, tensor] : {std::pair("q", &q), std::pair("k", &k)}) {
    OW_CHECK(tensor->size(1) < int64_t{1} << 31, op, ": ", name,
             " must have fewer than 2^31 tokens, got ", tensor->size(1));
  }
  check_last_stride(op, "q", q);
  check_last_stride(op, "k", k);
  check_last_stride(op, "v", v);
}

inline AttentionMask mask_of(const char* op, bool causal, int64_t window, int64_t sinks,
                             int64_t min_distance) {
  for (const auto& [name, value] : {std::pair("window", window), std::pair("sinks", sinks),
                                    std::pair("min_distance", min_distance)}) {
    OW_CHECK(value >= 0, op, ": ", name, " must be at least 0, got ", value);
    OW_CHECK(causal || value == 0, op, ": ", name, " must be 0 without causal, got ", value);
  }
  // More than any sequence is long means the same, and sums of them stay in range.
  constexpr int64_t kMost = int64_t{1} << 32;
  return {causal, min_of(window, kMost), min_of(sinks, kMost), min_of(min_distance, kMost)};
}

// Offsets of `name` rise from 0 to `tokens`.
inline const int32_t* check_seqlens(const char* op, const char* name, const Tensor& seqlens,
                                    int64_t count, int64_t tokens) {
  const int32_t* at = static_cast<const int32_t*>(seqlens.const_data_ptr());
  bool rises = at[0] == 0 && at[count] == tokens;
  for (int64_t s = 0; s < count; ++s) rises &= at[s] <= at[s + 1];
  OW_CHECK(rises, op, ": ", name, " must rise from 0 to ", tokens, " (tokens), got other values");
  return at;
}

inline std::vector<AttentionSequence> sequences_of(const char* op, const Tensor& q, const Tensor& k,
                                                   const Tensor& v, const Tensor* seqlens_q,
                                                   const Tensor* seqlens_k) {
  const int64_t b = q.size(0);
  std::vector<AttentionSequence> sequences;
  OW_CHECK((seqlens_q == nullptr) == (seqlens_k == nullptr), op,
           ": cu_seqlens_q and cu_seqlens_k must come together, got one");
  if (seqlens_q == nullptr) {
    for (int64_t s = 0; s < b; ++s) {
      sequences.push_back({q.size(1), k.size(1), s * q.stride(0), s * k.stride(0), s * v.stride(0),
                           s * q.size(1), s * q.size(2) * k.size(1), 0, 0});
    }
  } else {
    OW_CHECK(b == 1, op, ": q must be one batch with cu_seqlens_q, got ", b);
    check_dtype(op, "cu_seqlens_q", *seqlens_q, ScalarType::Int);
    OW_CHECK(seqlens_q->dim() == 1 && seqlens_q->size(0) >= 1, op,
             ": cu_seqlens_q must be [sequences + 1], got ", shape_text(*seqlens_q));
    check_contiguous(op, "cu_seqlens_q", *seqlens_q);
    check_operand(op, "cu_seqlens_k", *seqlens_k, ScalarType::Int, {seqlens_q->size(0)});
    const int64_t count = seqlens_q->size(0) - 1;
    const int32_t* at_q = check_seqlens(op, "cu_seqlens_q", *seqlens_q, count, q.size(1));
    const int32_t* at_k = check_seqlens(op, "cu_seqlens_k", *seqlens_k, count, k.size(1));
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

// What a call reads; `args` points into `sequences`.
struct AttentionCall {
  std::vector<AttentionSequence> sequences;
  BlockAttentionArgs args;
};

// Which keys a query sees.
struct AttentionOptions {
  int64_t block_m, block_n;
  bool causal;
  int64_t window, sinks, min_distance;
  std::optional<double> scale;
};

inline AttentionCall attention_call(const char* op, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const IndexTensors& index,
                                    const Tensor* cu_seqlens_q, const Tensor* cu_seqlens_k,
                                    const AttentionOptions& options) {
  check_operands(op, q, k, v);
  AttentionCall call{};
  BlockAttentionArgs& args = call.args;
  args.heads = q.size(2);
  args.kv_heads = k.size(2);
  args.d = q.size(3);
  args.dv = v.size(3);
  args.type = float_type(q);
  args.mask = mask_of(op, options.causal, options.window, options.sinks, options.min_distance);
  args.scale = float(options.scale.value_or(1.0 / std::sqrt(double(args.d))));
  OW_CHECK(std::isfinite(args.scale), op, ": scale must be finite, got ", args.scale);
  call.sequences = sequences_of(op, q, k, v, cu_seqlens_q, cu_seqlens_k);
  args.sequences = call.sequences.data();
  args.sequence_count = int64_t(call.sequences.size());
  set_index(op, index, options.block_m, options.block_n, &call.sequences, &args);
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
  args->packed = scratch.take<uint8_t>(plan.packed_bytes);
  args->packed_unit_bytes = plan.packed_unit_bytes;
  float* partial =
      args->scores == nullptr ? nullptr : scratch.take<float>(plan.partial_score_count);
  block_attention(*args, plan, scratch.take<uint8_t>(plan.tasks * plan.scratch_bytes), partial,
                  parallel);
}

}  // namespace ow
