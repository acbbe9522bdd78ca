// Lists of key blocks and single keys as arguments of an operator.
#pragma once

#include <vector>

#include "kernels/block_attention/block_attention.h"
#include "ops/glue.h"

namespace ow {

// The tensors of an index; null where the call has none.
struct IndexTensors {
  const Tensor* indptr;
  const Tensor* indices;
  const Tensor* column_indptr;
  const Tensor* columns;
};

// `rows`: blocks of queries; -1 where they follow from what offsets of sequences hold.
inline void check_lists(const char* op, const char* indptr_name, const Tensor& indptr,
                        const char* items_name, const Tensor& items, int64_t rows) {
  check_dtype(op, indptr_name, indptr, ScalarType::Int);
  OW_CHECK(indptr.dim() == 2 && indptr.size(0) >= 1, op, ": ", indptr_name,
           " must be [index_heads, rows + 1], got ", shape_text(indptr));
  if (rows >= 0) check_shape(op, indptr_name, indptr, {indptr.size(0), rows + 1});
  check_contiguous(op, indptr_name, indptr);
  check_dtype(op, items_name, items, ScalarType::Int);
  OW_CHECK(items.dim() == 1, op, ": ", items_name, " must be [n], got ", shape_text(items));
  check_contiguous(op, items_name, items);
}

// The tensors of an index of attention from `q` to `kv_heads` heads; `packed`: with cu_seqlens_q.
inline void check_index(const char* op, const IndexTensors& index, int64_t block_m, int64_t block_n,
                        const Tensor& q, int64_t kv_heads, bool packed) {
  OW_CHECK((index.indptr == nullptr) == (index.indices == nullptr), op,
           ": indptr and indices must come together, got one");
  OW_CHECK((index.column_indptr == nullptr) == (index.columns == nullptr), op,
           ": column_indptr and columns must come together, got one");
  if (index.indptr == nullptr) {
    OW_CHECK(index.columns == nullptr, op, ": columns must come with indptr and indices, got None");
    return;
  }
  for (const auto& [name, size] : {std::pair("block_m", block_m), std::pair("block_n", block_n)}) {
    OW_CHECK(size >= 16 && size <= 128 && size % 16 == 0, op, ": ", name,
             " must be a multiple of 16 in 16 .. 128, got ", size);
  }
  const int64_t rows = packed ? -1 : q.size(0) * div_up(q.size(1), block_m);
  check_lists(op, "indptr", *index.indptr, "indices", *index.indices, rows);
  const int64_t heads = index.indptr->size(0);
  OW_CHECK(heads == 1 || heads == kv_heads || heads == q.size(2), op,
           ": indptr must have 1, kv_heads = ", kv_heads, " or heads = ", q.size(2),
           " rows of lists, got ", heads);
  if (index.columns != nullptr) {
    check_lists(op, "column_indptr", *index.column_indptr, "columns", *index.columns, rows);
    check_shape(op, "column_indptr", *index.column_indptr, {heads, index.indptr->size(1)});
  }
}

// Offsets rise from 0 to the number of items, through all heads.
inline void check_list_offsets(const char* op, const char* name, const Tensor& indptr,
                               const Tensor& items) {
  const int32_t* at = static_cast<const int32_t*>(indptr.const_data_ptr());
  const int64_t rows = indptr.size(1) - 1;
  int32_t before = 0;
  bool rises = true;
  for (int64_t head = 0; head < indptr.size(0); ++head, at += rows + 1) {
    rises &= at[0] == before;
    for (int64_t r = 0; r < rows; ++r) rises &= at[r] <= at[r + 1];
    before = at[rows];
  }
  OW_CHECK(rises && before == items.size(0), op, ": ", name, " must rise from 0 to ", items.size(0),
           " (items) through all heads, got other values");
}

inline KeyLists key_lists(const Tensor* indptr, const Tensor* items) {
  if (indptr == nullptr) return {nullptr, nullptr};
  return {static_cast<const int32_t*>(indptr->const_data_ptr()),
          static_cast<const int32_t*>(items->const_data_ptr())};
}

// Every read and every sum a kernel makes follows from these: in each row numbers rise strictly and
// are of its own sequence, and no column is inside of a listed block.
inline void check_items(const char* op, const BlockAttentionArgs& a) {
  bool blocks_ok = true;
  bool columns_ok = true;
  bool apart = true;
  for (int64_t head = 0; head < a.index_heads; ++head) {
    for (int64_t s = 0; s < a.sequence_count; ++s) {
      const AttentionSequence& sequence = a.sequences[s];
      const int64_t key_blocks = div_up(sequence.keys, a.block_n);
      for (int64_t r = 0; r < div_up(sequence.queries, a.block_m); ++r) {
        const int64_t row = head * (a.index_rows + 1) + sequence.index_row + r;
        const int32_t* block = a.blocks.items + a.blocks.indptr[row];
        const int32_t* const block_end = a.blocks.items + a.blocks.indptr[row + 1];
        for (const int32_t* c = block; c != block_end; ++c) {
          blocks_ok &= *c >= 0 && *c < key_blocks && (c == block || c[-1] < *c);
        }
        if (a.columns.indptr == nullptr) continue;
        const int32_t* const column = a.columns.items + a.columns.indptr[row];
        const int32_t* const column_end = a.columns.items + a.columns.indptr[row + 1];
        for (const int32_t* c = column; c != column_end; ++c) {
          columns_ok &= *c >= 0 && *c < sequence.keys && (c == column || c[-1] < *c);
          while (block != block_end && (*block + 1) * a.block_n <= *c) ++block;
          apart &= block == block_end || *c < *block * a.block_n;
        }
      }
    }
  }
  OW_CHECK(blocks_ok, op,
           ": indices must rise strictly in each row and be key blocks of its "
           "sequence, got others");
  OW_CHECK(columns_ok, op,
           ": columns must rise strictly in each row and be keys of its sequence, "
           "got others");
  OW_CHECK(apart, op, ": columns must be outside of the row's listed blocks, got one inside");
}

// The index fields of `args`, whose sequences and heads are set, from a checked index; fills in
// sequences' index rows.
inline void read_index(const char* op, const IndexTensors& index, int64_t block_m, int64_t block_n,
                       std::vector<AttentionSequence>* sequences, BlockAttentionArgs* args) {
  args->index_heads = 1;
  args->block_m = args->block_n = 1;
  if (index.indptr == nullptr) return;
  int64_t rows = 0;
  for (AttentionSequence& sequence : *sequences) {
    sequence.index_row = rows;
    rows += div_up(sequence.queries, block_m);
  }
  OW_CHECK(index.indptr->size(1) == rows + 1, op, ": indptr must have the ", rows,
           " blocks of queries of cu_seqlens_q as rows, got ", index.indptr->size(1) - 1);
  check_list_offsets(op, "indptr", *index.indptr, *index.indices);
  if (index.columns != nullptr) {
    check_list_offsets(op, "column_indptr", *index.column_indptr, *index.columns);
  }
  args->index_heads = index.indptr->size(0);
  args->index_rows = rows;
  args->block_m = block_m;
  args->block_n = block_n;
  args->blocks = key_lists(index.indptr, index.indices);
  args->columns = key_lists(index.column_indptr, index.columns);
  check_items(op, *args);
}

}  // namespace ow
