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

// Calls body(value index, k) for each element stored in row r of a panel, in order of k.
template <class Body>
void for_each_in_row(const SparsePattern& w, int64_t panel, int64_t r, const Body& body) {
  for (int64_t b = 0; b < w.k_blocks; ++b) {
    const int64_t block = panel * w.k_blocks + b;
    const uint64_t* masks = w.masks + block * kSparsePanel;
    int64_t value = w.offsets[block];
    for (int64_t above = 0; above < r; ++above) value += __builtin_popcountll(masks[above]);
    for (uint64_t mask = masks[r]; mask != 0; mask &= mask - 1) {
      body(value++, b * kSparseBlockK + __builtin_ctzll(mask));
    }
  }
}

template <class Body>
void for_each_output(const SparsePattern& w, int64_t begin, int64_t end, const Body& body) {
  for (int64_t n = begin * kSparsePanel; n < min_of(end * kSparsePanel, w.n); ++n) {
    body(n, n / kSparsePanel, n % kSparsePanel);
  }
}

void run_rows(const SparseGemmArgs& a, int64_t begin, int64_t end, float*) {
  for (int64_t i = 0; i < a.m; ++i) {
    for_each_output(a.w, begin, end, [&](int64_t n, int64_t panel, int64_t r) {
      float sum = 0.0f;
      for_each_in_row(a.w, panel, r, [&](int64_t value, int64_t k) {
        sum += read_value(a.values, a.value_type, value) * row_element(a.x, a.m, i, k);
      });
      if (a.scales != nullptr) sum *= a.scales[n];
      if (a.bias != nullptr) sum += read_float(a.bias, a.y_type, n);
      const int64_t at = i * a.w.n + n;
      if (a.add != nullptr) sum += read_float(a.add, a.y_type, at);
      write_float(a.y, a.y_type, at, sum);
    });
  }
}

void run_sampled(const SampledGemmArgs& a, int64_t begin, int64_t end) {
  for_each_output(a.w, begin, end, [&](int64_t n, int64_t panel, int64_t r) {
    for_each_in_row(a.w, panel, r, [&](int64_t value, int64_t k) {
      float sum = 0.0f;
      for (int64_t i = 0; i < a.m; ++i) {
        sum += row_element(a.g, a.m, i, n) * row_element(a.x, a.m, i, k);
      }
      a.grad[value] = sum;
    });
  });
}

}  // namespace

const SparseGemmKernel sparse_gemm_rows_scalar = {run_rows, prepare_rows, 0};
const SampledGemmKernel sampled_gemm_scalar = {run_sampled, prepare_rows, 0};

}  // namespace ow
