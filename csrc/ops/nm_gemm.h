// The operators of N:M weights between their arguments and what computes: what those on the CPU and
// on a GPU share.
#pragma once

#include <tuple>

#include "kernels/nm_gemm/nm_gemm.h"
#include "kernels/quantize/quantize.h"
#include "ops/linear.h"

namespace ow {

constexpr const char* kNmLinearSchema =
    "nm_linear(Tensor x, Tensor values, Tensor index, Tensor? scales, Tensor? bias, Tensor? add, "
    "int layout, int n, int k, int kept, int block, int vector, int group_size, int compute) -> "
    "Tensor";
constexpr const char* kCompressNmSchema =
    "compress_nm(Tensor weight, Tensor? mask, Tensor? scales, int kept, int block, int vector, "
    "int bits, int group_size) -> (Tensor values, Tensor index, Tensor scales)";
constexpr const char* kExpandNmSchema =
    "expand_nm(Tensor values, Tensor index, Tensor? scales, int layout, int n, int k, int kept, "
    "int block, int vector, int group_size) -> (Tensor weight, Tensor scales)";

constexpr int64_t kNmComputeFloat = 0;
constexpr int64_t kNmComputeInt8 = 1;

// The logical weight behind the packed tensors.
struct NmWeight {
  int64_t n, k;
  int32_t kept, block, vector, bits;
  int64_t group_size, groups;

  bool is_int() const { return bits <= 8; }
  int64_t panels() const { return div_up(n, kNmPanel); }
  int64_t units() const { return nm_units(k, kept, block); }
};

// What the three operators ask of a pattern; bits must be one of the layouts'.
inline NmWeight check_nm_geometry(const char* op, int64_t n, int64_t k, int64_t kept, int64_t block,
                                  int64_t vector, int64_t bits, int64_t group_size) {
  OW_CHECK((block == 4 || block == 8 || block == 16 || block == 32) && kept >= 1 && kept < block,
           op, ": pattern must be N:M with M = 4, 8, 16 or 32 and N = 1 .. M - 1, got ", kept, ":",
           block);
  OW_CHECK(vector == 1 || vector == 8 || vector == 16 || vector == 32, op,
           ": vector must be 1, 8, 16 or 32, got ", vector);
  OW_CHECK(n >= 1 && k >= 1, op, ": weight must have at least one row and one column, got n = ", n,
           ", k = ", k);
  constexpr int64_t kMaxN = int64_t{1} << 31;
  constexpr int64_t kMaxK = int64_t{1} << 24;
  OW_CHECK(n < kMaxN && k < kMaxK, op,
           ": weight must have fewer than 2^31 rows and 2^24 columns, got n = ", n, ", k = ", k);
  const bool is_int = bits <= 8;
  OW_CHECK(
      group_size == k || (is_int && (group_size == 32 || group_size == 64 || group_size == 128)),
      op, is_int ? ": group_size must be 32, 64, 128 or k = " : ": group_size must be k = ", k,
      ", got ", group_size);
  OW_CHECK(!is_int || group_size <= kNmMaxGroup, op, ": one group a row takes k up to ",
           kNmMaxGroup, ", got ", k, "; use a smaller group_size");
  return {n,
          k,
          int32_t(kept),
          int32_t(block),
          int32_t(vector),
          int32_t(bits),
          group_size,
          div_up(k, group_size)};
}

inline int64_t check_nm_layout(const char* op, int64_t layout) {
  const LayoutInfo* info = layout_info(layout);
  OW_CHECK(info != nullptr && info->family == LayoutFamily::nm, op,
           ": layout must be one this build reads, got id ", layout,
           "; re-pack with openwork.compress_nm");
  return info->bits;
}

// The dtype of `values`. Of 16 bits it may be float16 too: `given` decides.
inline ScalarType nm_value_type(int64_t bits, const Tensor& given) {
  switch (bits) {
    case 32: return ScalarType::Float;
    case 16: {
      const bool f16 = given.defined() && given.scalar_type() == ScalarType::Half;
      return f16 ? ScalarType::Half : ScalarType::BFloat16;
    }
    case 8: return ScalarType::Char;
    default: return ScalarType::Byte;
  }
}
inline int64_t nm_value_lines(int64_t bits) { return nm_unit_value_bytes(int32_t(bits)) / 64; }
inline int64_t nm_values_per_lane(int64_t bits) { return bits == 32 ? 1 : bits == 16 ? 2 : 4; }

inline void check_nm_scales_given(const char* op, const NmWeight& w, const Tensor* scales) {
  OW_CHECK((scales != nullptr) == w.is_int(), op, ": scales must be ",
           w.is_int() ? "a tensor for values of 4 and 8 bits, got None"
                      : "None for values of 16 and 32 bits, got a tensor");
}

inline void check_nm_tensors(const char* op, const NmWeight& w, const Tensor& values,
                             const Tensor& index, const Tensor* scales) {
  check_operand(
      op, "values", values, nm_value_type(w.bits, values),
      {w.panels(), w.units(), nm_value_lines(w.bits), kNmPanel, nm_values_per_lane(w.bits)});
  check_operand(op, "index", index, ScalarType::Byte,
                {div_up(w.n, nm_index_outputs(w.vector)), w.units(), nm_index_bits(w.block),
                 nm_index_lanes(w.vector), 4});
  check_nm_scales_given(op, w, scales);
  if (scales == nullptr) return;
  check_float(op, "scales", *scales);
  check_shape(op, "scales", *scales, {w.panels(), w.groups, kNmPanel});
  check_contiguous(op, "scales", *scales);
}

// multiply(NmGemmArgs&) gets everything but `laid`, x as floats and at least one row.
template <class Multiply>
Tensor nm_linear_by(const Tensor& x_any, const Tensor& values, const Tensor& index,
                    const Tensor* scales, const Tensor* bias, const Tensor* add, int64_t layout,
                    int64_t n, int64_t k, int64_t kept, int64_t block, int64_t vector,
                    int64_t group_size, int64_t compute, const Multiply& multiply) {
  constexpr const char* kOp = "nm_linear";
  check_linear_x(kOp, x_any, k);
  const int64_t bits = check_nm_layout(kOp, layout);
  const NmWeight w = check_nm_geometry(kOp, n, k, kept, block, vector, bits, group_size);
  check_nm_tensors(kOp, w, values, index, scales);
  OW_CHECK(compute == kNmComputeFloat || (compute == kNmComputeInt8 && w.is_int()), kOp,
           w.is_int() ? ": compute must be 0 (float) or 1 (int8), got "
                      : ": compute must be 0 (float) for values of 16 and 32 bits, got ",
           compute);
  Tensor y = linear_result(kOp, x_any, n, bias, add);
  const int64_t m = y.numel() / n;
  if (m == 0) return y;
  const Tensor x = as_contiguous(x_any);
  NmGemmArgs args{};
  args.m = m;
  args.n = n;
  args.k = k;
  args.kept = w.kept;
  args.block = w.block;
  args.vector = w.vector;
  args.bits = w.bits;
  args.value_type = float_type(values);
  args.int8 = compute == kNmComputeInt8;
  args.group_size = w.group_size;
  args.groups = w.groups;
  args.x = x.const_data_ptr();
  args.values = values.const_data_ptr();
  args.index = static_cast<const uint8_t*>(index.const_data_ptr());
  args.scales = const_data(scales);
  args.scales_type = scales != nullptr ? float_type(*scales) : FloatType::f32;
  args.bias = const_data(bias);
  args.add = const_data(add);
  args.y = y.mutable_data_ptr();
  args.y_type = float_type(x);
  multiply(args);
  return y;
}

// What turns the rows of such a call into int8 codes [m, k], which args.x is to point at instead.
inline EncodeArgs nm_encode_args(const NmGemmArgs& args, int8_t* codes, float* scales) {
  EncodeArgs encode{};
  encode.m = args.m;
  encode.k = encode.group_size = encode.stride_x = args.k;
  encode.digits = 1;
  encode.blocks = {1, 16, args.k};
  encode.x_type = args.y_type;
  encode.x = args.x;
  encode.codes = codes;
  encode.scales = scales;
  return encode;
}

inline NmPackArgs nm_pack_args(const NmWeight& w, const Tensor* scales) {
  NmPackArgs args{};
  args.n = w.n;
  args.k = w.k;
  args.kept = w.kept;
  args.block = w.block;
  args.vector = w.vector;
  args.bits = w.bits;
  args.groups = scales == nullptr ? 0 : w.groups;
  args.scale_size = scales == nullptr ? 0 : float_size(float_type(*scales));
  args.scales = const_data(scales);
  return args;
}

[[noreturn]] inline void fail_nm_excess(const char* op, const NmPackArgs& args,
                                        const NmExcess& excess) {
  std::ostringstream where;
  where << "columns " << excess.column << " .. " << min_of(excess.column + args.block, args.k) - 1
        << " of output";
  if (args.vector == 1) {
    where << ' ' << excess.output;
  } else {
    where << "s " << excess.output << " .. " << min_of(excess.output + args.vector, args.n) - 1;
  }
  const bool masked = args.mask != nullptr;
  fail(op, masked ? ": mask must keep at most " : ": weight must have nonzeros in at most ",
       args.kept, " of each ", args.block, " columns, got ", excess.count, " in ", where.str(),
       masked ? "" : "; pass a mask");
}

// check(const NmPackArgs&, const Tensor& weight, const Tensor* scales) refuses codes, scales and
// masks that cannot be packed; pack(const NmPackArgs&, values, index, scales) packs them.
template <class Check, class Pack>
std::tuple<Tensor, Tensor, Tensor> compress_nm_by(const Tensor& weight_any, const Tensor* mask_any,
                                                  const Tensor* scales_any, int64_t kept,
                                                  int64_t block, int64_t vector, int64_t bits,
                                                  int64_t group_size, const Check& check,
                                                  const Pack& pack) {
  constexpr const char* kOp = "compress_nm";
  OW_CHECK(layout_for_bits(LayoutFamily::nm, bits) != nullptr, kOp,
           ": bits must be 4, 8, 16 or 32, got ", bits);
  check_dtype(kOp, "weight", weight_any,
              bits <= 8 ? ScalarType::Byte : nm_value_type(bits, weight_any));
  OW_CHECK(weight_any.dim() == 2, kOp, ": weight must be [n, k], got ", shape_text(weight_any));
  const NmWeight w = check_nm_geometry(kOp, weight_any.size(0), weight_any.size(1), kept, block,
                                       vector, bits, group_size);
  std::optional<Tensor> mask;
  if (mask_any != nullptr) {
    check_dtype(kOp, "mask", *mask_any, ScalarType::Bool);
    check_shape(kOp, "mask", *mask_any, {w.n, w.k});
    mask = as_contiguous(*mask_any);
  }
  check_nm_scales_given(kOp, w, scales_any);
  const Tensor weight = as_contiguous(weight_any);
  std::optional<Tensor> scales;
  if (w.is_int()) {
    check_float(kOp, "scales", *scales_any);
    check_shape(kOp, "scales", *scales_any, {w.n, w.groups});
    scales = as_contiguous(*scales_any);
  }
  NmPackArgs args = nm_pack_args(w, or_null(scales));
  args.weight = weight.const_data_ptr();
  args.mask = static_cast<const uint8_t*>(const_data(or_null(mask)));
  check(args, weight, or_null(scales));
  const Place place = place_of(weight);
  Tensor values =
      fast_empty({w.panels(), w.units(), nm_value_lines(bits), kNmPanel, nm_values_per_lane(bits)},
                 nm_value_type(bits, weight), place);
  Tensor index = fast_empty({div_up(w.n, nm_index_outputs(vector)), w.units(), nm_index_bits(block),
                             nm_index_lanes(vector), 4},
                            ScalarType::Byte, place);
  Tensor packed_scales =
      fast_empty({scales.has_value() ? w.panels() : 0, w.groups, kNmPanel},
                 scales.has_value() ? scales->scalar_type() : ScalarType::Float, place);
  pack(args, values.mutable_data_ptr(), static_cast<uint8_t*>(index.mutable_data_ptr()),
       packed_scales.mutable_data_ptr());
  return {values, index, packed_scales};
}

// expand(const NmPackArgs&, values, index, packed scales, weight, scales) is expand_nm.
template <class Expand>
std::tuple<Tensor, Tensor> expand_nm_by(const Tensor& values, const Tensor& index,
                                        const Tensor* scales, int64_t layout, int64_t n, int64_t k,
                                        int64_t kept, int64_t block, int64_t vector,
                                        int64_t group_size, const Expand& expand) {
  constexpr const char* kOp = "expand_nm";
  const int64_t bits = check_nm_layout(kOp, layout);
  const NmWeight w = check_nm_geometry(kOp, n, k, kept, block, vector, bits, group_size);
  check_nm_tensors(kOp, w, values, index, scales);
  const Place place = place_of(values);
  Tensor weight =
      fast_empty({n, k}, w.is_int() ? ScalarType::Byte : nm_value_type(bits, values), place);
  Tensor flat_scales =
      fast_empty({scales != nullptr ? n : 0, w.groups},
                 scales != nullptr ? scales->scalar_type() : ScalarType::Float, place);
  expand(nm_pack_args(w, scales), values.const_data_ptr(),
         static_cast<const uint8_t*>(index.const_data_ptr()), const_data(scales),
         weight.mutable_data_ptr(), flat_scales.mutable_data_ptr());
  return {weight, flat_scales};
}

}  // namespace ow
