// Multiply one token at a time by the columns of a weight that its larger activations meet:
//
//   y[i,n] = bias[n] + add[i,n] + sum_{k active} x[i,k] * w[n,k]        k active: not |x[i,k]| <= t
//
// (so a NaN is active). The bytes of other columns are not read. The sum runs over active k in
// order, one multiply-add at a time: with t = 0 it is the dense product, and at any t it equals, to
// the last bit, the product at t = 0 of x whose other elements are 0.
//
// A weight of codes is  w[n,k] = scale[g,n] * (c[n,k] - z[g,n]),  g = k / group_size:
//
//   y[i,n] = ... + sum_g scale[g,n] * (sum_k x[i,k] * c'[n,k] - z'[g,n] * sum_k x[i,k])
//
// over the active k of group g, with c' = c - 2^(bits-1) and z' = z - 2^(bits-1), 0 where `zeros`
// is null.
//
// Layouts. Column after column, so that a column that is skipped is bytes that are skipped; outputs
// past n are zero.
//
//   columns_n16k1     [k, n_padded] fp32 or bf16, n_padded a multiple of 16
//   columns2_n256k1   [k, n_padded / 256, 64 bytes]: 2-bit codes in strips of 256 outputs
//   columns3_n160k1   [k, n_padded / 160, 64 bytes]: 3.2 bits a code
//   columns4_n128k1   [k, n_padded / 128, 64 bytes]
//   columns8_n64k1    [k, n_padded / 64, 64 bytes]
//
//   strip: 16 lanes of 32 bits, little-endian. Bits [b i, b i + b) of lane l are output 16 i + l of
//   the strip, as the two's complement of c': two shifts give 16 consecutive outputs as integers.
//   Of 3-bit codes a lane has 10, and two bits that are zero.
//
// scales [groups, n_padded] fp32, zeros [groups, n_padded].
#pragma once

#include "core/kernel_table.h"
#include "core/layout.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

enum class ColumnType : int32_t { f32, bf16, codes };

// Active elements of one row of x, in order.
struct ActiveColumns {
  int64_t count;
  const int32_t* index;  // k
  const float* x;
  const int64_t*
      group_end;  // [groups]: how many are active up to the end of each group; codes only
};

struct ActiveGemvArgs {
  int64_t n, n_padded, groups;
  ColumnType type;
  int32_t bits;  // of codes
  const void* columns;
  const float* scales;   // of codes
  const uint8_t* zeros;  // of codes, or null
  ActiveColumns active;
  const void* bias;  // [n] of y_type, or null
  const void* add;   // [n] of y_type, or null
  void* y;           // [n] of y_type
  FloatType y_type;
};

// Outputs that a kernel's sums are kept for at a time, at most: with those of a group, 16 KiB.
constexpr int64_t kActiveChunk = 2048;

constexpr int64_t kStripBytes = 64;  // of codes
OW_INLINE int64_t strip_outputs(int32_t bits) { return bits == 0 ? 16 : 16 * (32 / bits); }
// Bytes of the codes of so many outputs, whole strips.
OW_INLINE int64_t strips_bytes(int32_t bits, int64_t outputs) {
  return outputs / strip_outputs(bits) * kStripBytes;
}

// y of outputs [begin, end): multiples of strip_outputs, but for the last n.
using ActiveGemvFn = void (*)(const ActiveGemvArgs&, int64_t begin, int64_t end);

#define OW_ACTIVE_GEMV_KERNELS(X)                       \
  OW_IF_AVX512(X(avx512, 0, kAnyM, active_gemv_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, active_gemv_avx2))       \
  X(scalar, 0, kAnyM, active_gemv_scalar)

#define OW_DECLARE(isa, key, max_m, fn) void fn(const ActiveGemvArgs&, int64_t, int64_t);
OW_ACTIVE_GEMV_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// The active elements of x [k] of x_type; index and x have room for k, group_end for each group.
int64_t find_active(const void* x, FloatType x_type, int64_t k, int64_t group_size, float threshold,
                    int32_t* index, float* active_x, int64_t* group_end);

void active_gemv(const ActiveGemvArgs& args, Isa isa, const Parallel& parallel);

// Codes [n, k], one byte each, to columns, and back.
struct ColumnPackArgs {
  int64_t n, k, n_padded;
  int32_t bits;
};
void pack_code_columns(const ColumnPackArgs& args, const uint8_t* codes, uint8_t* columns,
                       const Parallel& parallel);
void unpack_code_columns(const ColumnPackArgs& args, const uint8_t* columns, uint8_t* codes,
                         const Parallel& parallel);

}  // namespace ow
