// The formula, one multiply at a time. Every other tier is tested against this one.
#include "kernels/block_sparse_gemm/block_sparse_gemm.h"

namespace ow {
namespace {

// Tiles of one row: x is [m, k_padded].
float output(const BlockSparseGemmArgs& a, int64_t i, int64_t n) {
  const int64_t row = n / a.block;
  float sum = 0.0f;
  for (int64_t b = a.indptr[row]; b < a.indptr[row + 1]; ++b) {
    for (int64_t c = 0; c < a.block; ++c) {
      const int64_t at = (b * a.block + c) * a.block + n % a.block;
      sum +=
          read_value(a.values, a.value_type, at) * a.x[i * a.k_padded + a.indices[b] * a.block + c];
    }
  }
  return a.scales == nullptr ? sum : a.scales[n] * sum;
}

void run(const BlockSparseGemmArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t n = begin * a.block; n < min_of(end * a.block, a.n); ++n) {
      float value = output(a, i, n);
      if (a.bias != nullptr) value += read_float(a.bias, a.y_type, n);
      const int64_t at = i * a.n + n;
      if (a.add != nullptr) value += read_float(a.add, a.y_type, at);
      write_float(a.y, a.y_type, at, value);
    }
  }
}

}  // namespace

const BlockSparseGemmKernel block_sparse_gemm_scalar = {run, 1};

}  // namespace ow
