// The formulas, one multiply at a time. Every other tier is tested against these.
#include "kernels/sparse_gemm/sparse_gemm.h"

namespace ow {
namespace {

void prepare_rows(const SparseXArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t k = begin; k < end; ++k) {
      a.out[row_place(a.m, i, k)] = k < a.k ? read_float(a.x, a.type, i * a.k + k) : 0.0f;
    }
  }
}

float row_element(const float* rows, int64_t m, int64_t i, int64_t k) {
  return rows[row_place(m, i, k)];
}

float read_value(const SparseGemmArgs& a, int64_t i) {
  switch (a.value_type) {
    case ValueType::f32: return static_cast<const float*>(a.values)[i];
    case ValueType::bf16: return to_float(static_cast<const bf16*>(a.values)[i]);
    default: return float(static_cast<const int8_t*>(a.values)[i]);
  }
}

void run_rows(const SparseGemmArgs& a, int64_t begin, int64_t end, float*) {
  const SparsePattern& w = a.w;
  for (int64_t i = 0; i < a.m; ++i) {
    for (int64_t panel = begin; panel < end; ++panel) {
      float sums[kSparsePanel] = {};
      for (int64_t b = 0; b < w.k_blocks; ++b) {
        for_each_stored(w, panel * w.k_blocks + b, [&](int64_t value, int64_t r, int64_t column) {
          sums[r] += read_value(a, value) * row_element(a.x, a.m, i, b * w.block_k + column);
        });
      }
      for (int64_t n = panel * kSparsePanel; n < min_of((panel + 1) * kSparsePanel, w.n); ++n) {
        float sum = sums[n % kSparsePanel];
        if (a.scales != nullptr) sum *= a.scales[n];
        if (a.bias != nullptr) sum += read_float(a.bias, a.y_type, n);
        const int64_t at = i * w.n + n;
        if (a.add != nullptr) sum += read_float(a.add, a.y_type, at);
        write_float(a.y, a.y_type, at, sum);
      }
    }
  }
}

void run_sampled(const SampledGemmArgs& a, int64_t begin, int64_t end) {
  const SparsePattern& w = a.w;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t b = 0; b < w.k_blocks; ++b) {
      for_each_stored(w, panel * w.k_blocks + b, [&](int64_t value, int64_t r, int64_t column) {
        float sum = 0.0f;
        for (int64_t i = 0; i < a.m; ++i) {
          sum += row_element(a.g, a.m, i, panel * kSparsePanel + r) *
                 row_element(a.x, a.m, i, b * w.block_k + column);
        }
        a.grad[value] = sum;
      });
    }
  }
}

}  // namespace

const SparseGemmKernel sparse_gemm_rows_scalar = {run_rows, prepare_rows, 0};
const SparseGemmKernel sparse_gemm_bytes_scalar = {run_rows, prepare_rows, 0};
const SampledGemmKernel sampled_gemm_scalar = {run_sampled, prepare_rows, 0};

}  // namespace ow
