// The elementwise steps of a decoder block that are too small to pay a chain of torch calls for.
//
//   rms_norm   y[i,j] = x[i,j] * w[j] / sqrt(mean_j x[i,j]^2 + eps)
//   silu_mul   y[i,j] = g / (1 + e^-g) * u    g = x[i,j], u = x[i,d+j]
//   rope       y[i,h,j]       = x[i,h,j] * cos[p,j] - x[i,h,j+d/2] * sin[p,j]      j < d/2
//              y[i,h,j+d/2]   = x[i,h,j+d/2] * cos[p,j] + x[i,h,j] * sin[p,j]      p = i % t
//              y = x for heads from `turned` on (the values beside queries and keys)
//
// Arithmetic in fp32; one rounding to the output type.
#pragma once

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

struct RmsNormArgs {
  int64_t m, d;
  FloatType type;
  const void* x;  // [m, d]
  const void* w;  // [d], the type of x
  float eps;
  void* y;  // [m, d]
};
struct SiluMulArgs {
  int64_t m, d;
  FloatType type;
  const void* x;  // [m, 2d]
  void* y;        // [m, d]
};
// Where the element (b, t, h, 0) of a [b, t, h, d] tensor is; strides in elements, the last 1.
struct HeadStrides {
  int64_t b, t, h;
};
struct RopeArgs {
  int64_t b, t, h, d;  // d even
  int64_t turned;      // heads that are rotated; the rest are copied
  FloatType type;
  const void* x;
  HeadStrides x_strides;
  const float* cos;  // [t, d/2]
  const float* sin;  // [t, d/2]
  void* y;
  HeadStrides y_strides;
};

using RmsNormFn = void (*)(const RmsNormArgs&, int64_t row_begin, int64_t row_end);
using SiluMulFn = void (*)(const SiluMulArgs&, int64_t row_begin, int64_t row_end);
using RopeFn = void (*)(const RopeArgs&, int64_t row_begin, int64_t row_end);  // rows of b * t

struct ActivationKernels {
  RmsNormFn rms_norm;
  SiluMulFn silu_mul;
  RopeFn rope;
};

#define OW_ACTIVATIONS_KERNELS(X)                       \
  OW_IF_AVX512(X(avx512, 0, kAnyM, activations_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, activations_avx2))       \
  X(scalar, 0, kAnyM, activations_scalar)

#define OW_DECLARE(isa, key, max_m, kernels) extern const ActivationKernels kernels;
OW_ACTIVATIONS_KERNELS(OW_DECLARE)
#undef OW_DECLARE

void rms_norm(const RmsNormArgs& args, Isa isa, const Parallel& parallel);
void silu_mul(const SiluMulArgs& args, Isa isa, const Parallel& parallel);
void rope(const RopeArgs& args, Isa isa, const Parallel& parallel);

}  // namespace ow
