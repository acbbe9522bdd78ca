// A thin vector layer for float code whose one body serves every tier (norms, encoders, epilogues).
// Integer microkernels use intrinsics directly. Each tier provides, in namespace ow::OW_TARGET:
//
//   kLanes              lanes of a 32-bit element
//   VecF, VecI, Mask    floats, int32s, and a lane mask
//   load / load_n       from float, bf16, f16; the _n form reads n lanes and zeroes the rest
//   load (int32; int8 as floats), gather (entries of a table of floats)
//   store / store_n     to float, bf16, f16, rounding to nearest even
//   set1 add sub mul fma max_ div_ sqrt_, to_int (nearest even), to_float, abs_bits, bit_and,
//   shifts, store_i8 / store_i8_n (truncating), sum, max_of_lanes
//
//   swap_lanes<d>       lanes i and i ^ d exchanged, for d < kLanes
//   transpose           kLanes vectors as the rows of a square matrix, in place
//   sums_of             the sum of each of kLanes vectors, in the order of the lanes
#pragma once

#define OW_TARGET_scalar 1
#define OW_TARGET_avx2 2
#define OW_TARGET_avx512 3
#define OW_TARGET_avx512bf16 3
#define OW_TARGET_avx512amx 3
#define OW_TARGET_ID_(target) OW_TARGET_##target
#define OW_TARGET_ID(target) OW_TARGET_ID_(target)

#if OW_TARGET_ID(OW_TARGET) == 3
#include "simd/vec_avx512.h"
#elif OW_TARGET_ID(OW_TARGET) == 2
#include "simd/vec_avx2.h"
#else
#include "simd/vec_scalar.h"
#endif

namespace ow::OW_TARGET {
namespace {

// e^x for x <= 88; relative error below 3e-7. 2^round(x/ln2) times a degree-6 polynomial.
OW_INLINE VecF exp_(VecF x) {
  x = max_(x, set1(-87.3f));
  const VecI exponent = to_int(mul(x, set1(1.44269504f)));
  const VecF whole = to_float(exponent);
  VecF r = fma(whole, set1(-0.693359375f), x);
  r = fma(whole, set1(2.12194440e-4f), r);
  VecF p = set1(1.3888889e-3f);
  p = fma(p, r, set1(8.3333333e-3f));
  p = fma(p, r, set1(4.1666667e-2f));
  p = fma(p, r, set1(1.6666667e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return as_float(add(as_int(p), shift_left(exponent, 23)));
}

// 2^x for x < 127, 0 for x <= -127; relative error below 1.5e-7 down to 2^-126. NaN stays NaN.
// 2^round(x) times a polynomial whose largest error is least (9.1e-8), and which is 1 at 0: there
// the exponent field of x = -127 becomes 0.
OW_INLINE VecF exp2_(VecF x) {
  x = max_(set1(-127.0f), x);
  const VecI exponent = to_int(x);
  const VecF r = sub(x, to_float(exponent));
  VecF p = set1(1.32647273e-3f);
  p = fma(p, r, set1(9.67151299e-3f));
  p = fma(p, r, set1(5.55073358e-2f));
  p = fma(p, r, set1(2.40222424e-1f));
  p = fma(p, r, set1(6.93147004e-1f));
  p = fma(p, r, set1(1.0f));
  return as_float(add(as_int(p), shift_left(exponent, 23)));
}

}  // namespace
}  // namespace ow::OW_TARGET
