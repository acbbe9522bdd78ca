#include "kernels/nm_gemm/nm_gemm.h"

#include <tuple>

#include "kernels/quantize/quantize.h"
#include "ops/linear.h"
#include "ops/values.h"

namespace ow {
namespace {

constexpr int64_t kComputeFloat = 0;
constexpr int64_t kComputeInt8 = 1;

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
NmWeight check_geometry(const char* op, int64_t n, int64_t k, int64_t kept, int64_t block,
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

int64_t check_layout(const char* op, int64_t layout) {
  const LayoutInfo* info = layout_info(layout);
  OW_CHECK(info != nullptr && info->family == LayoutFamily::nm, op,
           ": layout must be one this build reads, got id ", layout,
           "; re-pack with openwork.compress_nm");
  return info->bits;
}

ScalarType value_type(int64_t bits) {
  switch (bits) {
    case 32: return ScalarType::Float;
    case 16: return ScalarType::BFloat16;
    case 8: return ScalarType::Char;
    default: return ScalarType::Byte;
  }
}
int64_t value_lines(int64_t bits) { return nm_unit_value_bytes(int32_t(bits)) / 64; }
int64_t values_per_lane(int64_t bits) { return bits == 32 ? 1 : bits == 16 ? 2 : 4; }

void check_scales_given(const char* op, const NmWeight& w, const Tensor* scales) {
  OW_CHECK((scales != nullptr) == w.is_int(), op, ": scales must be ",
           w.is_int() ? "a tensor for values of 4 and 8 bits, got None"
                      : "None for values of 16 and 32 bits, got a tensor");
}

void check_tensors(const char* op, const NmWeight& w, const Tensor& values, const Tensor& index,
                   const Tensor* scales) {
  check_operand(op, "values", values, value_type(w.bits),
                {w.panels(), w.units(), value_lines(w.bits), kNmPanel, values_per_lane(w.bits)});
  check_operand(op, "index", index, ScalarType::Byte,
                {div_up(w.n, nm_index_outputs(w.vector)), w.units(), nm_index_bits(w.block),
                 nm_index_lanes(w.vector), 4});
  check_scales_given(op, w, scales);
  if (scales == nullptr) return;
  check_float(op, "scales", *scales);
  check_shape(op, "scales", *scales, {w.panels(), w.groups, kNmPanel});
  check_contiguous(op, "scales", *scales);
}

NmGemmArgs gemm_args(const NmWeight& w, int64_t m, bool int8) {
  NmGemmArgs args{};
  args.m = m;
  args.n = w.n;
  args.k = w.k;
  args.kept = w.kept;
  args.block = w.block;
  args.vector = w.vector;
  args.bits = w.bits;
  args.int8 = int8;
  args.group_size = w.group_size;
  args.groups = w.groups;
  return args;
}

Tensor nm_linear(const Tensor& x_any, const Tensor& values, const Tensor& index,
                 const std::optional<Tensor>& scales, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& add, int64_t layout, int64_t n, int64_t k,
                 int64_t kept, int64_t block, int64_t vector, int64_t group_size, int64_t compute) {
  constexpr const char* kOp = "nm_linear";
  check_linear_x(kOp, x_any, k);
  const int64_t bits = check_layout(kOp, layout);
  const NmWeight w = check_geometry(kOp, n, k, kept, block, vector, bits, group_size);
  check_tensors(kOp, w, values, index, or_null(scales));
  OW_CHECK(compute == kComputeFloat || (compute == kComputeInt8 && w.is_int()), kOp,
           w.is_int() ? ": compute must be 0 (float) or 1 (int8), got "
                      : ": compute must be 0 (float) for values of 16 and 32 bits, got ",
           compute);
  Tensor y = linear_result(kOp, x_any, n, or_null(bias), or_null(add));
  const int64_t m = y.numel() / n;
  if (m == 0) return y;
  const Tensor x = as_contiguous(x_any);
  const Isa isa = active_isa();
  const Parallel parallel = torch_parallel();
  NmGemmArgs args = gemm_args(w, m, compute == kComputeInt8);
  const int64_t code_bytes = args.int8 ? m * k : 0;
  const Workspace workspace(Scratch::bytes_for(nm_laid_bytes(args, isa)) +
                            Scratch::bytes_for(code_bytes) + Scratch::bytes_for(m * 4));
  Scratch scratch = workspace.scratch();
  args.laid = scratch.take<uint8_t>(nm_laid_bytes(args, isa));
  args.x = x.const_data_ptr();
  if (args.int8) {
    EncodeArgs encode{};
    encode.m = m;
    encode.k = encode.group_size = encode.stride_x = k;
    encode.digits = 1;
    encode.blocks = {1, 16, k};
    encode.x_type = float_type(x);
    encode.x = args.x;
    encode.codes = scratch.take<int8_t>(code_bytes);
    encode.scales = scratch.take<float>(m);
    encode_rows(encode, isa, parallel);
    args.x = encode.codes;
    args.x_scales = encode.scales;
  }
  args.values = values.const_data_ptr();
  args.index = static_cast<const uint8_t*>(index.const_data_ptr());
  args.scales = const_data(or_null(scales));
  args.scales_type = scales.has_value() ? float_type(*scales) : FloatType::f32;
  args.bias = const_data(or_null(bias));
  args.add = const_data(or_null(add));
  args.y = y.mutable_data_ptr();
  args.y_type = float_type(x);
  nm_gemm(args, isa, parallel);
  return y;
}

NmPackArgs pack_args(const NmWeight& w, const Tensor* scales) {
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

void check_excess(const char* op, const NmPackArgs& args) {
  const NmExcess excess = find_nm_excess(args);
  if (excess.count == 0) return;
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

std::tuple<Tensor, Tensor, Tensor> compress_nm_op(const Tensor& weight_any,
                                                  const std::optional<Tensor>& mask_any,
                                                  const std::optional<Tensor>& scales_any,
                                                  int64_t kept, int64_t block, int64_t vector,
                                                  int64_t bits, int64_t group_size) {
  constexpr const char* kOp = "compress_nm";
  OW_CHECK(layout_for_bits(LayoutFamily::nm, bits) != nullptr, kOp,
           ": bits must be 4, 8, 16 or 32, got ", bits);
  check_dtype(kOp, "weight", weight_any, bits <= 8 ? ScalarType::Byte : value_type(bits));
  OW_CHECK(weight_any.dim() == 2, kOp, ": weight must be [n, k], got ", shape_text(weight_any));
  const NmWeight w = check_geometry(kOp, weight_any.size(0), weight_any.size(1), kept, block,
                                    vector, bits, group_size);
  std::optional<Tensor> mask;
  if (mask_any.has_value()) {
    check_dtype(kOp, "mask", *mask_any, ScalarType::Bool);
    check_shape(kOp, "mask", *mask_any, {w.n, w.k});
    mask = as_contiguous(*mask_any);
  }
  check_scales_given(kOp, w, or_null(scales_any));
  const Tensor weight = as_contiguous(weight_any);
  std::optional<Tensor> scales;
  if (w.is_int()) {
    check_float(kOp, "scales", *scales_any);
    check_shape(kOp, "scales", *scales_any, {w.n, w.groups});
    scales = as_contiguous(*scales_any);
    check_codes(kOp, "weight", weight, bits);
    check_finite(kOp, *scales);
  }
  NmPackArgs args = pack_args(w, or_null(scales));
  args.weight = weight.const_data_ptr();
  args.mask = static_cast<const uint8_t*>(const_data(or_null(mask)));
  check_excess(kOp, args);
  Tensor values =
      fast_empty({w.panels(), w.units(), value_lines(bits), kNmPanel, values_per_lane(bits)},
                 value_type(bits));
  Tensor index = fast_empty({div_up(w.n, nm_index_outputs(vector)), w.units(), nm_index_bits(block),
                             nm_index_lanes(vector), 4},
                            ScalarType::Byte);
  Tensor packed_scales = fast_empty({scales.has_value() ? w.panels() : 0, w.groups, kNmPanel},
                                    scales.has_value() ? scales->scalar_type() : ScalarType::Float);
  compress_nm(args, values.mutable_data_ptr(), static_cast<uint8_t*>(index.mutable_data_ptr()),
              packed_scales.mutable_data_ptr(), torch_parallel());
  return {values, index, packed_scales};
}

std::tuple<Tensor, Tensor> expand_nm_op(const Tensor& values, const Tensor& index,
                                        const std::optional<Tensor>& scales, int64_t layout,
                                        int64_t n, int64_t k, int64_t kept, int64_t block,
                                        int64_t vector, int64_t group_size) {
  constexpr const char* kOp = "expand_nm";
  const int64_t bits = check_layout(kOp, layout);
  const NmWeight w = check_geometry(kOp, n, k, kept, block, vector, bits, group_size);
  check_tensors(kOp, w, values, index, or_null(scales));
  Tensor weight = fast_empty({n, k}, w.is_int() ? ScalarType::Byte : value_type(bits));
  Tensor flat_scales = fast_empty({scales.has_value() ? n : 0, w.groups},
                                  scales.has_value() ? scales->scalar_type() : ScalarType::Float);
  expand_nm(pack_args(w, or_null(scales)), values.const_data_ptr(),
            static_cast<const uint8_t*>(index.const_data_ptr()), const_data(or_null(scales)),
            weight.mutable_data_ptr(), flat_scales.mutable_data_ptr(), torch_parallel());
  return {weight, flat_scales};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "nm_linear(Tensor x, Tensor values, Tensor index, Tensor? scales, Tensor? bias, Tensor? add, "
      "int layout, int n, int k, int kept, int block, int vector, int group_size, int compute) -> "
      "Tensor");
  m.def(
      "compress_nm(Tensor weight, Tensor? mask, Tensor? scales, int kept, int block, int vector, "
      "int bits, int group_size) -> (Tensor values, Tensor index, Tensor scales)");
  m.def(
      "expand_nm(Tensor values, Tensor index, Tensor? scales, int layout, int n, int k, int kept, "
      "int block, int vector, int group_size) -> (Tensor weight, Tensor scales)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("nm_linear", TORCH_BOX(&ow::nm_linear));
  m.impl("compress_nm", TORCH_BOX(&ow::compress_nm_op));
  m.impl("expand_nm", TORCH_BOX(&ow::expand_nm_op));
}
