// Multiply by a group-quantized weight:
//
//   y[i,n] = bias[n] + add[i,n] + sum_g scale_w[n,g] * sum_{k in g} x[i,k] * (c[n,k] - z[n,g])
//
//   c  codes, 0 .. 2^bits - 1           z  zero points, 2^(bits-1) where `zeros` is null
//   g  groups of group_size consecutive k; the last may be shorter, and one group may be all of k
//
// The inner sum is never taken over floats. Activations arrive encoded (kernels/quantize):
//   digits = 1   x = x_scale[i] * int8                        ("int8" mode)
//   digits = 3   x = x_scale[i,g] * (three base-256 digits)   ("float" mode: fp32 accuracy)
// so a group's sum is exact in int32 and z costs one product with the group's digit sum. Every tier
// computes the same integers; only the fp32 sum over groups (in order of g) is rounded.
//   digits = 0   x stays bf16 and meets c - z, exact in bf16, in a bf16 dot product ("float" mode
//                for many rows of bf16 on tiers that have the instruction)
//
// Layouts. A panel is 32 outputs in two halves (rows of w past n are zero); k is padded to a
// multiple of 32 with zero codes. A line is 64 bytes: 16 outputs x 4 bytes, so that one 32-bit lane
// belongs to one output. A unit is 16 k. Byte b of lane n holds, low bits first:
//
//   w8_n32k4    k = 4l + b                             4 lines a unit and half
//   w4_n32k8    k = 8l + b | k + 4                     2 lines
//   w2_n32k16   k = 16l + b | k + 4 | k + 8 | k + 12   1 line
//   w3_n32k32   j = k / 4 of 32 k: three bits at bit 3 (j % 3) of line j / 3, but for j = 2 and 5,
//               of which only two fit: the third is bit 6 and 7 of line 2
//                                                      3 lines every two units
//
//   one panel:  | k_block 0: half 0 lines, half 1 lines | k_block 1: ... |
//
// A k_block is 16 k (32 for 3 bits). The packed tensor is [panels, k_padded / k_block, 2, lines,
// 16, 4] with lines of one half = 1, 3, 2, 4 for 2, 3, 4, 8 bits; scales and zeros are [panels,
// groups, 32]. A thread streams its share of the weight once, front to back: one stream of bytes is
// what the prefetchers follow best, and two halves let each broadcast of x serve two products.
#pragma once

#include "core/code_lines.h"
#include "core/kernel_table.h"
#include "core/layout.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/types.h"

namespace ow {

constexpr int64_t kPanel = 32;
constexpr int64_t kHalf = 16;
constexpr int64_t kUnit = 16;
constexpr int64_t kPadK = 32;

// Digit rows (m * digits) up to which unpacking in registers beats unpacking to the cache, and the
// blocks the tile kernels take their rows in.
constexpr int64_t kRowsKernelMaxRows = 24;
constexpr int64_t kTileRowBlock = 6;
// A tile register of AMX: rows, and bytes of one.
constexpr int64_t kAmxRows = 16;
constexpr int64_t kAmxBytes = 64;

// The int32 sums hold |code| * |digit| * k < 2^31 up to this k in one group.
constexpr int64_t kMaxGroup = 65536;

struct LowbitGemmArgs {
  int64_t m, n, k;
  int64_t k_padded, group_size, groups;
  int32_t bits;
  int32_t digits;  // 1, 3: x is int8 digit rows; 0: x is rows of bf16 (on a GPU, of y_type)
  const void* x;
  RowBlocks x_blocks;     // of its rows, as lowbit_gemm_x_blocks says
  const float* x_scales;  // digits 1: [m]; digits 3: [m, groups]; digits 0: null
  const int32_t* x_sums;  // [m, digits, groups] times lowbit_sum_factor; digits 0: null
  const uint8_t* w;       // packed
  const void* w_scales;   // [panels, groups, 32] of w_scales_type
  FloatType w_scales_type;
  const uint8_t* w_zeros;  // [panels, groups, 32], or null
  const void* bias;        // [n] of y_type, or null
  const void* add;         // [m, n] of y_type, contiguous, or null
  void* y;                 // [m, n] of y_type, contiguous
  FloatType y_type;
};

// Computes panels [begin, end) of every row.
using LowbitGemmFn = void (*)(const LowbitGemmArgs&, int64_t begin, int64_t end);

// What a kernel reads: its layout and its kind of activations.
constexpr int32_t lowbit_key(Layout layout, bool bf16_x) { return int32_t(layout) * 2 + bf16_x; }

// "rows" kernels unpack in registers and are bound by memory; "tile" kernels unpack 64 outputs to
// the cache once for many rows. max_m counts digit rows (m * digits).
#define OW_LOWBIT_GEMM_EACH_LAYOUT(X, isa, bf16_x, max_m, fn) \
  X(isa, lowbit_key(Layout::w2_n32k16, bf16_x), max_m, fn)    \
  X(isa, lowbit_key(Layout::w3_n32k32, bf16_x), max_m, fn)    \
  X(isa, lowbit_key(Layout::w4_n32k8, bf16_x), max_m, fn)     \
  X(isa, lowbit_key(Layout::w8_n32k4, bf16_x), max_m, fn)

#define OW_LOWBIT_GEMM_KERNELS(X)                                                                 \
  OW_IF_AVX512AMX(OW_LOWBIT_GEMM_EACH_LAYOUT(X, avx512amx, true, kAnyM,                           \
                                             lowbit_gemm_tile_32x16_bf16_avx512amx))              \
  OW_IF_AVX512AMX(                                                                                \
      OW_LOWBIT_GEMM_EACH_LAYOUT(X, avx512amx, false, kAnyM, lowbit_gemm_tile_32x16_avx512amx))   \
  OW_IF_AVX512BF16(                                                                               \
      OW_LOWBIT_GEMM_EACH_LAYOUT(X, avx512bf16, true, kAnyM, lowbit_gemm_tile_64x6_avx512bf16))   \
  OW_IF_AVX512(                                                                                   \
      OW_LOWBIT_GEMM_EACH_LAYOUT(X, avx512, false, kRowsKernelMaxRows, lowbit_gemm_rows_avx512))  \
  OW_IF_AVX512(OW_LOWBIT_GEMM_EACH_LAYOUT(X, avx512, false, kAnyM, lowbit_gemm_tile_64x6_avx512)) \
  OW_IF_AVX2(OW_LOWBIT_GEMM_EACH_LAYOUT(X, avx2, false, kAnyM, lowbit_gemm_rows_avx2))            \
  OW_LOWBIT_GEMM_EACH_LAYOUT(X, scalar, false, kAnyM, lowbit_gemm_rows_scalar)

#define OW_DECLARE(isa, key, max_m, fn) void fn(const LowbitGemmArgs&, int64_t, int64_t);
OW_LOWBIT_GEMM_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// What x_sums are multiplied by. A symmetric weight's accumulators start at -zero * sum and need no
// correction after; an asymmetric one's end with - zeros[n] * sum.
OW_INLINE int32_t lowbit_sum_factor(int32_t bits, bool symmetric) {
  return symmetric ? -(1 << (bits - 1)) : 1;
}

// How a kernel wants the m * digits rows of x (m for digits = 0).
RowBlocks lowbit_gemm_x_blocks(const KernelEntry<LowbitGemmFn>& kernel, int64_t m, int32_t digits,
                               int64_t k);
// The same of the kernel that would be chosen.
RowBlocks lowbit_gemm_x_blocks(Isa isa, int64_t m, int32_t digits, int64_t k);

// Whether `m` rows of bf16 are better left as bf16 (digits = 0) than encoded.
bool lowbit_gemm_takes_bf16(Isa isa, int64_t m);
// x [m, k] to out in blocks, zero past k.
void block_bf16_rows(const bf16* x, int64_t m, int64_t k, const RowBlocks& blocks, bf16* out,
                     const Parallel& parallel);

void lowbit_gemm(const LowbitGemmArgs& args, Isa isa, const Parallel& parallel);

// Where code (lane, k) of a panel lies: `bits` low bits at `shift` of `byte`, and the one above
// them, if the code has more, at `high_shift` of `high_byte`.
struct CodePlace {
  int64_t byte;
  int shift, bits;
  int64_t high_byte;
  int high_shift;
};
OW_INLINE CodePlace code_place(int32_t bits, int64_t lane, int64_t k) {
  const int64_t start = k / block_k(bits) * block_bytes(bits) +
                        lane / kHalf * (block_bytes(bits) / 2) + lane % kHalf * 4 + k % 4;
  const CodeLines at = code_lines(bits, k);
  return {start + at.line, at.shift, at.high_shift < 0 ? bits : 2, start + at.high_line,
          at.high_shift};
}
// `panel` points at the bytes of the panel the lane is in.
OW_INLINE uint8_t code_of(int32_t bits, const uint8_t* panel, int64_t lane, int64_t k) {
  const CodePlace at = code_place(bits, lane, k);
  const int low = panel[at.byte] >> at.shift & ((1 << at.bits) - 1);
  if (at.bits == bits) return uint8_t(low);
  return uint8_t(low | (panel[at.high_byte] >> at.high_shift & 1) << at.bits);
}

// Packing. codes [n, k] one byte each, scales [n, groups], zeros [n, groups] or null; the packed
// tensors as above. Padding outputs get scale 0 and zero point 0.
struct LowbitPackArgs {
  int64_t n, k, k_padded, groups;
  int32_t bits;
  int64_t scale_size;  // bytes of one scale
};
void pack_lowbit(const LowbitPackArgs& args, const uint8_t* codes, const void* scales,
                 const uint8_t* zeros, uint8_t* packed, void* packed_scales, uint8_t* packed_zeros,
                 const Parallel& parallel);
void unpack_lowbit(const LowbitPackArgs& args, const uint8_t* packed, const void* packed_scales,
                   const uint8_t* packed_zeros, uint8_t* codes, void* scales, uint8_t* zeros,
                   const Parallel& parallel);

// Rows of the weight, for an embedding: y[i,k] = scale * (c[rows[i],k] - z).
struct LowbitRowsArgs {
  int64_t count;
  const int64_t* rows;  // [count], in 0 .. n - 1
  int64_t k, k_padded, group_size, groups;
  int32_t bits;
  const uint8_t* w;
  const void* w_scales;
  FloatType w_scales_type;
  const uint8_t* w_zeros;  // or null
  void* y;                 // [count, k] of y_type
  FloatType y_type;
};
void lowbit_rows(const LowbitRowsArgs& args, const Parallel& parallel);

}  // namespace ow
