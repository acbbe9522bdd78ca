// From what an estimator marks to the lists that block_attention reads.
//
// Row r of a sequence is its queries r * block_m .. ; query i is at position p = sk - sq + i. Head
// x of that row lists block c, keys c * block_n .. , that (where it is causal) is not entirely
// behind its last query, if
//
//   blocks[s, x, r, c]                                  or
//   the block begins before sinks[x]                    or
//   0 <= p - j < windows[x]  for a query p and a key j  or
//   slashes[s, x, p - j]     for a query p and a key j  or
//   columns[s, x, j]         for all its keys j
//
// and as single keys those j, where it is causal not behind the last query, of blocks that it does
// not list, with columns[s, x, j].
//
// Marks are bytes, so no mark names a key that is not there and none names one twice. A row takes
// O(1) for each of its blocks: whether a range of keys (or of distances) has a mark is the
// difference of two of its running counts.
//
// Also here: largest_elements, which turns scores into marks.
#pragma once

#include "core/parallel.h"
#include "core/sequences.h"
#include "core/types.h"

namespace ow {

struct BlockIndexArgs {
  int64_t heads, block_m, block_n;
  bool causal;
  int64_t rows;  // of all sequences
  Sequences queries, keys;
  const uint8_t* blocks;  // [sequences, heads, max_rows, max_blocks], or null
  int64_t max_rows, max_blocks;
  const uint8_t* columns;  // [sequences, heads, max_keys], or null
  const uint8_t* slashes;  // alike
  int64_t max_keys;
  const int32_t* windows;  // [heads]
  const int32_t* sinks;    // [heads]
  int32_t* column_counts;  // [sequences, heads, max_keys + 1]: marks before a key; scratch
  int32_t* slash_counts;   // alike
};

// Elements of column_counts, and of slash_counts.
int64_t block_index_scratch(const BlockIndexArgs& args);

// How many blocks and single keys each row lists, [heads, rows] each.
void count_lists(const BlockIndexArgs& args, int32_t* block_counts, int32_t* column_counts,
                 const Parallel& parallel);

// The lists, where indptr and column_indptr [heads, rows + 1] say.
void fill_lists(const BlockIndexArgs& args, const int32_t* indptr, const int32_t* column_indptr,
                int32_t* indices, int32_t* columns, const Parallel& parallel);

// marks[i, j] = 1 for the largest scores of row i, of equal ones the first, and 0 for the others:
//   by count: budgets[i] of them, rounded up
//   by mass:  the fewest whose sum reaches budgets[i]
// A negative score has no mass, -inf is never marked, and NaN counts as the largest. A row whose
// total does not exceed its budget, or is NaN, has everything but -inf marked.
struct LargestArgs {
  int64_t rows, n;
  bool by_mass;
  const float* scores;   // [rows, n]
  const float* budgets;  // [rows]
  uint8_t* marks;        // [rows, n]
};
void largest_elements(const LargestArgs& args, const Parallel& parallel);

}  // namespace ow
