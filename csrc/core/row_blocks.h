// Rows of activations in blocks: what a kernel multiplies together lies together, a few k at a
// time. Rows a power of two apart would fight for the same cache sets.
//
//   element k of row r at (r / R) * R * k_padded + (k / K) * K * R + (r % R) * K + k % K
//
// with R = rows and K = k. R = 1 is row-major. The last block is as large as the others.
#pragma once

#include "core/types.h"

namespace ow {

struct RowBlocks {
  int64_t rows;      // R
  int64_t k;         // K, a power of two
  int64_t k_padded;  // of a row; a multiple of K
};

OW_INLINE int64_t element_at(const RowBlocks& b, int64_t r, int64_t k) {
  return r / b.rows * b.rows * b.k_padded + k / b.k * b.k * b.rows + r % b.rows * b.k + k % b.k;
}
OW_INLINE int64_t element_count(const RowBlocks& b, int64_t rows) {
  return round_up(rows, b.rows) * b.k_padded;
}

}  // namespace ow
