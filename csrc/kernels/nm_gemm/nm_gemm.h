// Multiply by an N:M sparse weight: of every M consecutive k, each output keeps at most N.
//
//   y[i,n] = bias[n] + add[i,n] + sum_s x[i, column(n,s)] * w[n,s]
//   column(n,s) = s / N * M + index[n,s]
//   w[n,s] = value, or scale[n,g] * value with g = column(n,s) / group_size
//
// A slot s is the place of one stored weight; a block of M columns has N slots, in ascending order
// of index. A block that keeps fewer fills up with zeros at unused columns. V consecutive outputs
// (V = 1, 8, 16, 32) may share one index. In code N is `kept`, M is `block`, V is `vector`.
//
// Layouts. A panel is 16 outputs, a unit is 32 slots, a line is 64 bytes: 16 outputs x 4 bytes, so
// that one 32-bit lane belongs to one output. Outputs past n and slots past the last are zero.
//
//   values [panels, units, lines, 16, per lane]     slots of lane l of line q, low bits first
//     nm32_n16k1   fp32    32 lines                 s = q
//     nm16_n16k2   bf16    16                       s = 2q | 2q + 1
//     nm8_n16k4    int8     8                       s = 4q + byte
//     nm4_n16k8    int4     4                       s = 8q + byte | + 4       two's complement
//
//   index [ceil(n / max(V, 16)), units, log2 M lines, lanes, 4 bytes]  lanes = 16 (V = 1), 2 (8), 1
//     byte b of a lane belongs to slots s % 4 = b, low bits first:
//     M = 4, 8     2 lines of 2 bits: line s / 16, bit 2 (s / 4 % 4)
//     M = 16, 32   4 lines of 4 bits: line s / 8,  bit 4 (s / 4 % 2)
//     M = 8, 32    and a last line with the index's high bit: bit s / 4
//
//   scales [panels, groups, 16]; a group is group_size consecutive k, a multiple of M, or all of k.
//
// 2:4 int4 is thus 12 bits for 4 weights, and scales. Index and values are apart so that V outputs
// can share a lane. An index cannot leave its block whatever its bits are, and x is padded to whole
// blocks, so no packed weight makes a kernel read outside of x.
//
// Two ways to compute, in both of which a result does not depend on the number of threads:
//   float   fp32 products and sums of x and w; where both are bf16, a tier may count denormals
//           as zero
//   int8    x = x_scale[i] * int8 (kernels/quantize), int8 and int4 values only: a group's sum is
//           exact in int32, and only the fp32 sum over groups is rounded
#pragma once

#include "core/kernel_table.h"
#include "core/layout.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

constexpr int64_t kNmPanel = 16;
constexpr int64_t kNmUnit = 32;

// The int32 sums hold 255 * 128 * slots < 2^31 up to this many k in one group.
constexpr int64_t kNmMaxGroup = 65536;

struct NmGemmArgs {
  int64_t m, n, k;
  int32_t kept, block, vector;
  int32_t bits;          // of a value: 4, 8, 16, 32
  FloatType value_type;  // of values of 16 bits: bf16, and on GPUs f16
  bool int8;             // how to compute
  int64_t group_size, groups;
  const void* x;          // [m, k] of y_type, contiguous; int8: codes
  const float* x_scales;  // int8: [m]
  void* laid;             // nm_laid_bytes of scratch: x as the kernel reads it
  const void* values;
  const uint8_t* index;
  const void* scales;  // of scales_type; null for bits = 16, 32
  FloatType scales_type;
  const void* bias;  // [n] of y_type, or null
  const void* add;   // [m, n] of y_type, contiguous, or null
  void* y;           // [m, n] of y_type, contiguous
  FloatType y_type;
};

// Sizes of the packed tensors.
OW_INLINE int64_t nm_slots(int64_t k, int64_t kept, int64_t block) {
  return div_up(k, block) * kept;
}
OW_INLINE int64_t nm_units(int64_t k, int64_t kept, int64_t block) {
  return div_up(nm_slots(k, kept, block), kNmUnit);
}
OW_INLINE int64_t nm_index_bits(int64_t block) {
  return block == 4 ? 2 : block == 8 ? 3 : block == 16 ? 4 : 5;
}
OW_INLINE int64_t nm_index_lanes(int64_t vector) { return vector == 1 ? 16 : vector == 8 ? 2 : 1; }
// Outputs whose index lies together: a panel's, or two panels' where they share it.
OW_INLINE int64_t nm_index_outputs(int64_t vector) { return vector == 32 ? 32 : 16; }

OW_INLINE int64_t nm_units(const NmGemmArgs& a) { return nm_units(a.k, a.kept, a.block); }
// Columns that the slots of all units may point at: x is padded to as many.
OW_INLINE int64_t nm_columns(const NmGemmArgs& a) {
  return div_up(nm_units(a) * kNmUnit, a.kept) * a.block;
}
OW_INLINE int64_t nm_unit_value_bytes(int32_t bits) { return kNmUnit * kNmPanel * bits / 8; }
OW_INLINE int64_t nm_unit_index_bytes(int32_t block, int32_t vector) {
  return nm_index_bits(block) * nm_index_lanes(vector) * 4;
}
// The first value and the first index byte of a unit of a panel.
OW_INLINE const uint8_t* nm_unit_values(const NmGemmArgs& a, int64_t panel, int64_t unit) {
  return static_cast<const uint8_t*>(a.values) +
         (panel * nm_units(a) + unit) * nm_unit_value_bytes(a.bits);
}
OW_INLINE const uint8_t* nm_unit_index(const NmGemmArgs& a, int64_t panel, int64_t unit) {
  const int64_t row = a.vector == 32 ? panel / 2 : panel;
  return a.index + (row * nm_units(a) + unit) * nm_unit_index_bytes(a.block, a.vector);
}

// How a family of kernels wants x, and what it does with it.
struct NmGemmKernels {
  // Bytes of `laid`.
  int64_t (*laid_bytes)(const NmGemmArgs&);
  // Rows of x that are laid out together.
  int64_t row_block;
  // Writes row blocks [begin, end) of `laid`.
  void (*lay_out)(const NmGemmArgs&, int64_t begin, int64_t end);
  // Computes panels [begin, end) of every row.
  void (*multiply)(const NmGemmArgs&, int64_t begin, int64_t end);
};

// What kernels read: a layout, and the way to compute.
constexpr int32_t nm_key(Layout layout, bool int8) { return int32_t(layout) * 2 + int8; }

// "rows" kernels select from a row of x in registers and are bound by memory; "panel" kernels
// multiply a weight by many tokens at once, and "pairs" kernels two of them.
#define OW_NM_GEMM_EACH_INT(X, isa, int8, max_m, kernels) \
  X(isa, nm_key(Layout::nm4_n16k8, int8), max_m, kernels) \
  X(isa, nm_key(Layout::nm8_n16k4, int8), max_m, kernels)
#define OW_NM_GEMM_EACH_LAYOUT(X, isa, max_m, kernels)      \
  OW_NM_GEMM_EACH_INT(X, isa, false, max_m, kernels)        \
  X(isa, nm_key(Layout::nm16_n16k2, false), max_m, kernels) \
  X(isa, nm_key(Layout::nm32_n16k1, false), max_m, kernels)

// Rows up to which selecting in registers beats a panel of one vector of tokens.
constexpr int64_t kNmRowsMaxM = 8;
// Rows from which on 16 tokens in pairs, some of them zero, beat rows of floats.
constexpr int64_t kNmPairsMinM = 7;

#define OW_NM_GEMM_KERNELS(X)                                                            \
  OW_IF_AVX512BF16(                                                                      \
      X(avx512bf16, nm_key(Layout::nm16_n16k2, false), kAnyM, nm_gemm_pairs_avx512bf16)) \
  OW_IF_AVX512(OW_NM_GEMM_EACH_LAYOUT(X, avx512, kNmRowsMaxM, nm_gemm_rows_avx512))      \
  OW_IF_AVX512(OW_NM_GEMM_EACH_LAYOUT(X, avx512, kAnyM, nm_gemm_panel_avx512))           \
  OW_IF_AVX512(OW_NM_GEMM_EACH_INT(X, avx512, true, kAnyM, nm_gemm_int8_avx512))         \
  OW_IF_AVX2(OW_NM_GEMM_EACH_LAYOUT(X, avx2, kAnyM, nm_gemm_panel_avx2))                 \
  OW_IF_AVX2(OW_NM_GEMM_EACH_INT(X, avx2, true, kAnyM, nm_gemm_int8_avx2))               \
  OW_NM_GEMM_EACH_LAYOUT(X, scalar, kAnyM, nm_gemm_scalar)                               \
  OW_NM_GEMM_EACH_INT(X, scalar, true, kAnyM, nm_gemm_scalar)

#define OW_DECLARE(isa, key, max_m, kernels) extern const NmGemmKernels kernels;
OW_NM_GEMM_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// The tier, at most `isa`, whose kernels take a call. int8 above avx2: four slots of a line must
// lie in one group, and within 64 columns. bf16 pairs: x is bf16, and the pattern 2:4 or shared.
OW_INLINE Isa nm_tier(const NmGemmArgs& a, Isa isa) {
  if (a.int8) {
    const bool narrow = a.block < 32 || a.kept > 1;
    const bool in_group = a.groups == 1 || a.group_size / a.block * a.kept % 4 == 0;
    return isa > Isa::avx2 && !(narrow && in_group) ? Isa::avx2 : isa;
  }
  const bool pairs = a.vector > 1 || (a.kept == 2 && a.block == 4);
  const bool bf16_pairs = a.bits == 16 && a.y_type == FloatType::bf16 && pairs;
  return isa > Isa::avx512 && !bf16_pairs ? Isa::avx512 : isa;
}

// Scratch memory that nm_gemm wants at args.laid.
int64_t nm_laid_bytes(const NmGemmArgs& args, Isa isa);

void nm_gemm(const NmGemmArgs& args, Isa isa, const Parallel& parallel);

// Packing. `weight` [n, k] holds fp32, bf16, or codes of one byte with zero point 2^(bits - 1);
// `mask` [n, k] says with 1 what is kept, or is null: what is not zero is.
struct NmPackArgs {
  int64_t n, k;
  int32_t kept, block, vector, bits;
  int64_t groups, scale_size;  // of scales, in bytes
  const void* weight;
  const uint8_t* mask;
  const void* scales;  // [n, groups], or null
};

// The first place where more weights are kept than the pattern allows.
struct NmExcess {
  int64_t output, column, count;  // first of the V outputs and of the M columns; count 0: none
};
NmExcess find_nm_excess(const NmPackArgs& args);

// Of a weight without excess.
void compress_nm(const NmPackArgs& args, void* values, uint8_t* index, void* packed_scales,
                 const Parallel& parallel);
// The inverse, with zeros where nothing is kept. Of args, `weight`, `mask` and `scales` are unused.
void expand_nm(const NmPackArgs& args, const void* values, const uint8_t* index,
               const void* packed_scales, void* weight, void* scales, const Parallel& parallel);

// One slot, for code that reads slot by slot. `lane` counts the outputs of the panel.
OW_INLINE int64_t nm_index_at(const uint8_t* unit_index, int32_t block, int32_t vector,
                              int64_t lane, int64_t s) {
  const int64_t lanes = nm_index_lanes(vector);
  const uint8_t* byte = unit_index + lane * lanes / kNmPanel * 4 + s % 4;
  const int64_t line = lanes * 4;
  if (block <= 8) {
    const int low = byte[s / 16 * line] >> (s / 4 % 4 * 2) & 3;
    return block == 4 ? low : low | (byte[2 * line] >> (s / 4) & 1) << 2;
  }
  const int low = byte[s / 8 * line] >> (s / 4 % 2 * 4) & 15;
  return block == 16 ? low : low | (byte[4 * line] >> (s / 4) & 1) << 4;
}
OW_INLINE int nm_code_at(const uint8_t* unit_values, int32_t bits, int64_t lane, int64_t s) {
  if (bits == 8) return int8_t(unit_values[s / 4 * 64 + lane * 4 + s % 4]);
  const int nibble = unit_values[s / 8 * 64 + lane * 4 + s % 4] >> (s / 4 % 2 * 4) & 15;
  return (nibble ^ 8) - 8;
}
OW_INLINE float nm_float_at(const uint8_t* unit_values, int32_t bits, int64_t lane, int64_t s) {
  const int64_t at = bits == 32 ? s * kNmPanel + lane : s / 2 * 32 + lane * 2 + s % 2;
  return bits == 32 ? reinterpret_cast<const float*>(unit_values)[at]
                    : to_float(reinterpret_cast<const bf16*>(unit_values)[at]);
}

}  // namespace ow
