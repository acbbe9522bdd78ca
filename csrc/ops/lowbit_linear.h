// The low-bit linear between checked tensors and kernels: what lowbit_linear and the operators
// built on it share.
#pragma once

#include "kernels/lowbit_gemm/lowbit_gemm.h"
#include "ops/glue.h"

namespace ow {

struct LowbitWeight {
  const LayoutInfo* layout;
  int64_t n, k, k_padded, panels, group_size, groups;
};

constexpr int64_t kComputeFloat = 0;
constexpr int64_t kComputeInt8 = 1;

const LayoutInfo* check_layout(const char* op, int64_t layout);

LowbitWeight check_lowbit_geometry(const char* op, const LayoutInfo* layout, int64_t n, int64_t k,
                                   int64_t group_size);

// zeros may be null.
void check_lowbit_tensors(const char* op, const LowbitWeight& w, const Tensor& packed,
                          const Tensor& scales, const Tensor* zeros);
void check_compute(const char* op, int64_t compute);

// A multiplication of contiguous x [m, k] into y [m, n], both of one type. It points into the
// tensors it is made of; zeros and bias may be null.
class LowbitLinear {
 public:
  LowbitLinear(const LowbitWeight& w, const Tensor& packed, const Tensor& scales,
               const Tensor* zeros, const Tensor* bias, int64_t compute, int64_t m, FloatType type);

  // What `run` takes of its scratch memory.
  int64_t scratch_bytes() const;

  // add may be null, and may be y.
  void run(const void* x, const void* add, void* y, Scratch scratch,
           const Parallel& parallel) const;

 private:
  int64_t code_bytes() const;
  int64_t scale_count() const;
  int64_t sum_count() const;

  Isa isa_;  // for which the rows are laid out
  LowbitGemmArgs gemm_;
};

}  // namespace ow
