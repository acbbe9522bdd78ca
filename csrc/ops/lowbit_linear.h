// The low-bit linear between checked tensors and kernels: what lowbit_linear and the operators
// built on it share.
#pragma once

#include "kernels/lowbit_gemm/lowbit_gemm.h"
#include "ops/linear.h"

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

constexpr const char* kLowbitLinearSchema =
    "lowbit_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, "
    "Tensor? add, int layout, int n, int k, int group_size, int compute) -> Tensor";

// The operator around multiply(weight, x, m, y), which is called for at least one row; x is
// contiguous.
template <class Multiply>
Tensor lowbit_linear_by(const Tensor& x, const Tensor& packed, const Tensor& scales,
                        const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& add, int64_t layout, int64_t n, int64_t k,
                        int64_t group_size, int64_t compute, const Multiply& multiply) {
  constexpr const char* kOp = "lowbit_linear";
  check_linear_x(kOp, x, k);
  const LowbitWeight w = check_lowbit_geometry(kOp, check_layout(kOp, layout), n, k, group_size);
  check_lowbit_tensors(kOp, w, packed, scales, or_null(zeros));
  check_compute(kOp, compute);
  Tensor y = linear_result(kOp, x, n, or_null(bias), or_null(add));
  const int64_t m = y.numel() / n;
  if (m > 0) multiply(w, as_contiguous(x), m, y);
  return y;
}

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
