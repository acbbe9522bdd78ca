// Operators on low-bit weights themselves, between their arguments and what packs, unpacks or reads
// rows: what those on the CPU and on a GPU share.
#pragma once

#include <tuple>

#include "ops/lowbit_linear.h"

namespace ow {

constexpr const char* kPackLowbitSchema =
    "pack_lowbit(Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size) -> "
    "(Tensor packed, Tensor scales, Tensor zeros)";
constexpr const char* kUnpackLowbitSchema =
    "unpack_lowbit(Tensor packed, Tensor scales, Tensor? zeros, int layout, int n, int k, "
    "int group_size) -> (Tensor codes, Tensor scales, Tensor zeros)";
constexpr const char* kLowbitEmbeddingSchema =
    "lowbit_embedding(Tensor ids, Tensor packed, Tensor scales, Tensor? zeros, int layout, int n, "
    "int k, int group_size, ScalarType dtype) -> Tensor";

// Tensors of a packed weight; zeros is empty where it has none.
using LowbitTensors = std::tuple<Tensor, Tensor, Tensor>;

inline LowbitPackArgs pack_args(const LowbitWeight& w, const Tensor& scales) {
  const int64_t scale_size = scales.scalar_type() == ScalarType::Float ? 4 : 2;
  return {w.n, w.k, w.k_padded, w.groups, w.layout->bits, scale_size};
}

// check(args, codes, scales, zeros) refuses values; pack(args, codes, scales, zeros, packed,
// packed_scales, packed_zeros) is pack_lowbit of the kernels. All are contiguous tensors, zeros may
// be null.
template <class Check, class Pack>
LowbitTensors pack_lowbit_by(const Tensor& codes_any, const Tensor& scales_any,
                             const std::optional<Tensor>& zeros_any, int64_t bits,
                             int64_t group_size, const Check& check, const Pack& pack) {
  constexpr const char* kOp = "pack_lowbit";
  const LayoutInfo* layout = layout_for_bits(LayoutFamily::lowbit, bits);
  OW_CHECK(layout != nullptr, kOp, ": bits must be 2, 3, 4 or 8, got ", bits);
  check_dtype(kOp, "codes", codes_any, ScalarType::Byte);
  OW_CHECK(codes_any.dim() == 2, kOp, ": codes must be [n, k], got ", shape_text(codes_any));
  const LowbitWeight w =
      check_lowbit_geometry(kOp, layout, codes_any.size(0), codes_any.size(1), group_size);
  check_float(kOp, "scales", scales_any);
  check_shape(kOp, "scales", scales_any, {w.n, w.groups});
  std::optional<Tensor> zeros;
  if (zeros_any.has_value()) {
    check_dtype(kOp, "zeros", *zeros_any, ScalarType::Byte);
    check_shape(kOp, "zeros", *zeros_any, {w.n, w.groups});
    zeros = as_contiguous(*zeros_any);
  }
  const Tensor codes = as_contiguous(codes_any);
  const Tensor scales = as_contiguous(scales_any);
  const LowbitPackArgs args = pack_args(w, scales);
  check(args, codes, scales, or_null(zeros));
  const Place place = place_of(codes);
  Tensor packed = fast_empty(
      {w.panels, w.k_padded / block_k(layout->bits), 2, block_bytes(layout->bits) / 128, kHalf, 4},
      ScalarType::Byte, place);
  Tensor packed_scales = fast_empty({w.panels, w.groups, kPanel}, scales.scalar_type(), place);
  Tensor packed_zeros =
      fast_empty({zeros.has_value() ? w.panels : 0, w.groups, kPanel}, ScalarType::Byte, place);
  pack(args, static_cast<const uint8_t*>(codes.const_data_ptr()), scales.const_data_ptr(),
       static_cast<const uint8_t*>(const_data(or_null(zeros))),
       static_cast<uint8_t*>(packed.mutable_data_ptr()), packed_scales.mutable_data_ptr(),
       static_cast<uint8_t*>(packed_zeros.mutable_data_ptr()));
  return {packed, packed_scales, packed_zeros};
}

// unpack(args, packed, packed_scales, packed_zeros, codes, scales, zeros) is unpack_lowbit of the
// kernels.
template <class Unpack>
LowbitTensors unpack_lowbit_by(const Tensor& packed, const Tensor& scales,
                               const std::optional<Tensor>& zeros, int64_t layout, int64_t n,
                               int64_t k, int64_t group_size, const Unpack& unpack) {
  constexpr const char* kOp = "unpack_lowbit";
  const LowbitWeight w = check_lowbit_geometry(kOp, check_layout(kOp, layout), n, k, group_size);
  check_lowbit_tensors(kOp, w, packed, scales, or_null(zeros));
  const Place place = place_of(packed);
  Tensor codes = fast_empty({n, k}, ScalarType::Byte, place);
  Tensor flat_scales = fast_empty({n, w.groups}, scales.scalar_type(), place);
  Tensor flat_zeros = fast_empty({zeros.has_value() ? n : 0, w.groups}, ScalarType::Byte, place);
  unpack(pack_args(w, scales), static_cast<const uint8_t*>(packed.const_data_ptr()),
         scales.const_data_ptr(), static_cast<const uint8_t*>(const_data(or_null(zeros))),
         static_cast<uint8_t*>(codes.mutable_data_ptr()), flat_scales.mutable_data_ptr(),
         zeros.has_value() ? static_cast<uint8_t*>(flat_zeros.mutable_data_ptr()) : nullptr);
  return {codes, flat_scales, flat_zeros};
}

// read(args) reads rows of the weight; at least one element.
template <class Read>
Tensor lowbit_embedding_by(const Tensor& ids_any, const Tensor& packed, const Tensor& scales,
                           const std::optional<Tensor>& zeros, int64_t layout, int64_t n, int64_t k,
                           int64_t group_size, ScalarType dtype, const Read& read) {
  constexpr const char* kOp = "lowbit_embedding";
  check_dtype(kOp, "ids", ids_any, ScalarType::Long);
  OW_CHECK(ids_any.dim() < kMaxDim, kOp, ": ids must have fewer than ", kMaxDim,
           " dimensions, got ", ids_any.dim());
  const LowbitWeight w = check_lowbit_geometry(kOp, check_layout(kOp, layout), n, k, group_size);
  check_lowbit_tensors(kOp, w, packed, scales, or_null(zeros));
  OW_CHECK(is_float(dtype), kOp, ": dtype must be float32, bfloat16 or float16, got ",
           dtype_name(dtype));
  const Tensor ids = as_contiguous(ids_any);
  int64_t sizes[kMaxDim];
  for (int64_t i = 0; i < ids.dim(); ++i) sizes[i] = ids.size(i);
  sizes[ids.dim()] = k;
  Tensor y = fast_empty(sizes, ids.dim() + 1, dtype, place_of(packed));
  LowbitRowsArgs args{};
  args.count = ids.numel();
  args.rows = static_cast<const int64_t*>(ids.const_data_ptr());
  args.k = k;
  args.k_padded = w.k_padded;
  args.group_size = group_size;
  args.groups = w.groups;
  args.bits = w.layout->bits;
  args.w = static_cast<const uint8_t*>(packed.const_data_ptr());
  args.w_scales = scales.const_data_ptr();
  args.w_scales_type = float_type(scales);
  args.w_zeros = static_cast<const uint8_t*>(const_data(or_null(zeros)));
  args.y = y.mutable_data_ptr();
  args.y_type = float_type(dtype);
  if (y.numel() > 0) read(args);
  return y;
}

}  // namespace ow
