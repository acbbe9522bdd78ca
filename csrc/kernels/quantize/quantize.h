// Activation encoders: rows of floats to rows of int8, for the integer GEMMs.
//
// digits = 1, dynamic int8, one scale a row:
//   scale[i] = max_k |x[i,k]| / 127        code[i,k] = round(x[i,k] * (127 / max_k |x[i,k]|))
//
// digits = 3, fixed point, one power-of-two scale a row and group of k, in balanced base 256:
//   scale[i,g] = 2^e, the smallest with max_{k in g} |x[i,k]| <= 8355711 * 2^e
//   round(x[i,k] / scale[i,g]) = 65536 * code[i,0,k] + 256 * code[i,1,k] + code[i,2,k]
//   The error is at most half a step, 1.004 * 2^-23 of the group's largest magnitude: what fp32
//   itself would lose.
//   (8355711 = 127 * (65536 + 256 + 1), the largest value three int8 digits can hold.)
//
//   sum[i,d,g] = sum_factor * sum_{k in g} code[i,d,k]  (exact; what a zero point is multiplied by)
//
// Digit rows r = i * digits + d are stored in blocks (core/row_blocks.h) of at least 16 k.
//
// Round is to nearest even. A row (group) that holds an infinity or a NaN gets scale NaN and codes
// 0; one whose largest magnitude is too small to scale (< 2^-120 for a row, 2^-100 for a group)
// gets scale 0.
#pragma once

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/types.h"

namespace ow {

struct EncodeArgs {
  int64_t m, k;
  int64_t group_size;  // of k; a multiple of 16, or k
  int32_t digits;      // 1 or 3
  RowBlocks blocks;    // of codes, which are zero past k
  FloatType x_type;
  const void* x;  // [m, k]
  int64_t stride_x;
  int32_t sum_factor;
  int8_t* codes;  // m * digits rows in blocks
  float* scales;  // digits 1: [m]; digits 3: [m, groups]
  int32_t* sums;  // [m, digits, groups], or null
};

using EncodeFn = void (*)(const EncodeArgs&, int64_t row_begin, int64_t row_end);

#define OW_QUANTIZE_KERNELS(X)                          \
  OW_IF_AVX512(X(avx512, 0, kAnyM, encode_rows_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, encode_rows_avx2))       \
  X(scalar, 0, kAnyM, encode_rows_scalar)

#define OW_DECLARE(isa, key, max_m, fn) void fn(const EncodeArgs&, int64_t, int64_t);
OW_QUANTIZE_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// Encodes every row, split over the threads of `parallel`.
void encode_rows(const EncodeArgs& args, Isa isa, const Parallel& parallel);

}  // namespace ow
