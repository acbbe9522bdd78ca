// Pages of keys and values as arguments of an operator: a list of tensors and a list of numbers.
//
//   format   page_size, then of keys and of values: d, bits, axis (0 channel, 1 token), group_size,
//            window, step, outliers, codebook (0, 1); then bounds (0, 1), positions (0, 1)
//   tensors  block_table, lengths; of keys and of values: rows if dense, else committed, codes,
//            scales, mins, tail, and where the format has them table, and outlier_index with
//            outlier_values; then, where there are any, key_min with key_max, and positions
#pragma once

#include <vector>

#include "core/kv_pages.h"
#include "ops/glue.h"

namespace ow {

// Checks the format and the dtypes, shapes and layouts of the tensors.
KVPages check_kv_pages(const char* op, const std::vector<Tensor>& tensors,
                       const std::vector<int64_t>& format);

// Checks what they hold but for the page numbers, of which an operator checks those that it uses:
// codebooks, and in O(rows) lengths and tokens in pages.
void check_kv_values(const char* op, const KVPages& pages);

// Pages of tokens [begin, end) of a row must be numbers of pages.
void check_kv_table(const char* op, const KVPages& pages, int64_t row, int64_t begin, int64_t end);

}  // namespace ow
