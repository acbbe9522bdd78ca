// Sequences as arguments of an operator: offsets into tokens, as attention libraries name them.
#pragma once

#include "core/sequences.h"
#include "ops/glue.h"

namespace ow {

// Offsets cu_seqlens [sequences + 1] int32; gives the number of sequences.
inline int64_t check_offsets(const char* op, const char* name, const Tensor& tensor) {
  check_dtype(op, name, tensor, ScalarType::Int);
  OW_CHECK(tensor.dim() == 1 && tensor.size(0) >= 1, op, ": ", name,
           " must be [sequences + 1], got ", shape_text(tensor));
  check_contiguous(op, name, tensor);
  return tensor.size(0) - 1;
}

// What they hold: numbers that rise from 0.
inline Sequences read_offsets(const char* op, const char* name, const Tensor& tensor) {
  const int32_t* offsets = static_cast<const int32_t*>(tensor.const_data_ptr());
  const int64_t count = tensor.size(0) - 1;
  bool rises = offsets[0] == 0;
  for (int64_t s = 0; s < count; ++s) rises &= offsets[s] <= offsets[s + 1];
  OW_CHECK(rises, op, ": ", name, " must rise from 0, got other values");
  return {offsets, count, 0};
}

// The sequences of x [b, n, ...] are its rows, or with offsets the parts of its only row; gives
// their number.
inline int64_t check_sequences(const char* op, const char* x_name, const Tensor& x,
                               const char* name, const Tensor* offsets) {
  if (offsets == nullptr) return x.size(0);
  const int64_t count = check_offsets(op, name, *offsets);
  OW_CHECK(x.size(0) == 1, op, ": ", x_name, " must have a batch of 1 with ", name, ", got ",
           x.size(0));
  return count;
}

// Once they are checked.
inline Sequences read_sequences(const char* op, const Tensor& x, const char* name,
                                const Tensor* offsets) {
  if (offsets == nullptr) return {nullptr, x.size(0), x.size(1)};
  const Sequences sequences = read_offsets(op, name, *offsets);
  const int64_t total = sequences.offsets[sequences.count];
  OW_CHECK(total == x.size(1), op, ": ", name, " must rise from 0 to ", x.size(1),
           " (tokens), got an end of ", total);
  return sequences;
}

// Queries and keys must come in as many sequences.
inline void check_same_count(const char* op, int64_t queries, int64_t keys) {
  OW_CHECK(queries == keys, op, ": keys must come in ", queries, " sequences (as queries do), got ",
           keys);
}

inline void check_sequence_pairs(const char* op, const Tensor& q, const Tensor& k,
                                 const Tensor* offsets_q, const Tensor* offsets_k) {
  const int64_t queries = check_sequences(op, "q", q, "cu_seqlens_q", offsets_q);
  check_same_count(op, queries, check_sequences(op, "k", k, "cu_seqlens_k", offsets_k));
}

// A size of the longest sequence, which without offsets is `most` and with them no more.
inline void check_longest(const char* op, const char* name, int64_t size, int64_t most,
                          const Tensor* offsets) {
  check_range(op, name, size, offsets == nullptr ? most : 0, most);
}

// x [b, n, heads, d] of a float type, its last dimension together.
inline void check_heads(const char* op, const char* name, const Tensor& x) {
  check_float(op, name, x);
  OW_CHECK(x.dim() == 4 && x.size(2) >= 1 && x.size(3) >= 1, op, ": ", name,
           " must be [b, n, heads, d] with heads and d at least 1, got ", shape_text(x));
  OW_CHECK(x.size(0) < int64_t{1} << 31 && x.size(1) < int64_t{1} << 31, op, ": ", name,
           " must have fewer than 2^31 sequences and tokens, got ", shape_text(x));
  check_last_stride(op, name, x);
}

// Queries q and the keys k they attend to, head x to key head x // (heads / kv_heads).
inline void check_queries_and_keys(const char* op, const Tensor& q, const Tensor& k) {
  check_heads(op, "q", q);
  check_heads(op, "k", k);
  check_dtype(op, "k", k, q.scalar_type());
  OW_CHECK(k.size(3) == q.size(3), op, ": k must have the d of q, ", q.size(3), ", got ",
           k.size(3));
  OW_CHECK(q.size(2) % k.size(2) == 0, op, ": q must have a multiple of kv_heads = ", k.size(2),
           " heads, got ", q.size(2));
}

}  // namespace ow
