#include "ops/lowbit_linear.h"

#include "ops/lowbit_weight.h"
#include "ops/quantize_rows.h"
#include "ops/values.h"

namespace ow {

LowbitLinear::LowbitLinear(const LowbitWeight& w, const Tensor& packed, const Tensor& scales,
                           const Tensor* zeros, const Tensor* bias, int64_t compute, int64_t rows,
                           FloatType x_type)
    : isa_(active_isa()), gemm_{} {
  const bool as_bf16 =
      compute == kComputeFloat && x_type == FloatType::bf16 && lowbit_gemm_takes_bf16(isa_, rows);
  gemm_.m = rows;
  gemm_.n = w.n;
  gemm_.k = w.k;
  gemm_.k_padded = w.k_padded;
  gemm_.group_size = w.group_size;
  gemm_.groups = w.groups;
  gemm_.bits = w.layout->bits;
  gemm_.digits = as_bf16 ? 0 : compute == kComputeInt8 ? 1 : 3;
  gemm_.x_blocks = lowbit_gemm_x_blocks(isa_, rows, gemm_.digits, w.k);
  gemm_.w = static_cast<const uint8_t*>(packed.const_data_ptr());
  gemm_.w_scales = scales.const_data_ptr();
  gemm_.w_scales_type = float_type(scales);
  gemm_.w_zeros = static_cast<const uint8_t*>(const_data(zeros));
  gemm_.bias = const_data(bias);
  gemm_.y_type = x_type;
}

int64_t LowbitLinear::code_bytes() const {
  if (gemm_.digits == 0) return element_count(gemm_.x_blocks, gemm_.m) * 2;
  return element_count(gemm_.x_blocks, gemm_.m * gemm_.digits);
}
int64_t LowbitLinear::scale_count() const {
  return gemm_.digits == 3 ? gemm_.m * gemm_.groups : gemm_.m;
}
int64_t LowbitLinear::sum_count() const { return gemm_.m * gemm_.digits * gemm_.groups; }

int64_t LowbitLinear::scratch_bytes() const {
  return Scratch::bytes_for(code_bytes()) + Scratch::bytes_for(scale_count() * 4) +
         Scratch::bytes_for(sum_count() * 4);
}

void LowbitLinear::run(const void* x, const void* add, void* y, Scratch scratch,
                       const Parallel& parallel) const {
  LowbitGemmArgs args = gemm_;
  args.add = add;
  args.y = y;
  if (gemm_.digits == 0) {
    bf16* rows = scratch.take<bf16>(code_bytes() / 2);
    block_bf16_rows(static_cast<const bf16*>(x), gemm_.m, gemm_.k, gemm_.x_blocks, rows, parallel);
    args.x = rows;
    return lowbit_gemm(args, isa_, parallel);
  }
  EncodeArgs encode{};
  encode.m = gemm_.m;
  encode.k = gemm_.k;
  encode.group_size = gemm_.group_size;
  encode.digits = gemm_.digits;
  encode.blocks = gemm_.x_blocks;
  encode.sum_factor = lowbit_sum_factor(gemm_.bits, gemm_.w_zeros == nullptr);
  encode.x_type = gemm_.y_type;
  encode.x = x;
  encode.stride_x = gemm_.k;
  encode.codes = scratch.take<int8_t>(code_bytes());
  encode.scales = scratch.take<float>(scale_count());
  encode.sums = scratch.take<int32_t>(sum_count());
  encode_rows(encode, isa_, parallel);
  args.x = encode.codes;
  args.x_scales = encode.scales;
  args.x_sums = encode.sums;
  lowbit_gemm(args, isa_, parallel);
}

namespace {

Tensor lowbit_linear(const Tensor& x_any, const Tensor& packed, const Tensor& scales,
                     const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& add, int64_t layout, int64_t n, int64_t k,
                     int64_t group_size, int64_t compute) {
  return lowbit_linear_by(x_any, packed, scales, zeros, bias, add, layout, n, k, group_size,
                          compute,
                          [&](const LowbitWeight& w, const Tensor& x, int64_t m, Tensor& y) {
                            const LowbitLinear linear(w, packed, scales, or_null(zeros),
                                                      or_null(bias), compute, m, float_type(x));
                            const Workspace workspace(linear.scratch_bytes());
                            linear.run(x.const_data_ptr(), const_data(or_null(add)),
                                       y.mutable_data_ptr(), workspace.scratch(), torch_parallel());
                          });
}

Tensor lowbit_embedding(const Tensor& ids, const Tensor& packed, const Tensor& scales,
                        const std::optional<Tensor>& zeros, int64_t layout, int64_t n, int64_t k,
                        int64_t group_size, ScalarType dtype) {
  return lowbit_embedding_by(
      ids, packed, scales, zeros, layout, n, k, group_size, dtype, [&](const LowbitRowsArgs& args) {
        for (int64_t i = 0; i < args.count; ++i) {
          OW_CHECK(args.rows[i] >= 0 && args.rows[i] < n, "lowbit_embedding: ids must be in 0 .. ",
                   n - 1, ", got ", args.rows[i]);
        }
        lowbit_rows(args, torch_parallel());
      });
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x) {
  return quantize_rows_by(
      x, [](const EncodeArgs& args) { encode_rows(args, active_isa(), torch_parallel()); });
}

LowbitTensors pack_lowbit_op(const Tensor& codes, const Tensor& scales,
                             const std::optional<Tensor>& zeros, int64_t bits, int64_t group_size) {
  constexpr const char* kOp = "pack_lowbit";
  return pack_lowbit_by(
      codes, scales, zeros, bits, group_size,
      [&](const LowbitPackArgs&, const Tensor& all_codes, const Tensor& all_scales,
          const Tensor* all_zeros) {
        check_codes(kOp, "codes", all_codes, bits);
        check_finite(kOp, all_scales);
        if (all_zeros != nullptr) check_codes(kOp, "zeros", *all_zeros, bits);
      },
      [](const auto&... pack) { pack_lowbit(pack..., torch_parallel()); });
}

LowbitTensors unpack_lowbit_op(const Tensor& packed, const Tensor& scales,
                               const std::optional<Tensor>& zeros, int64_t layout, int64_t n,
                               int64_t k, int64_t group_size) {
  return unpack_lowbit_by(
      packed, scales, zeros, layout, n, k, group_size,
      [](const auto&... unpack) { unpack_lowbit(unpack..., torch_parallel()); });
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(ow::kLowbitLinearSchema);
  m.def(ow::kLowbitEmbeddingSchema);
  m.def(ow::kQuantizeRowsSchema);
  m.def(ow::kPackLowbitSchema);
  m.def(ow::kUnpackLowbitSchema);
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("lowbit_linear", TORCH_BOX(&ow::lowbit_linear));
  m.impl("lowbit_embedding", TORCH_BOX(&ow::lowbit_embedding));
  m.impl("quantize_rows", TORCH_BOX(&ow::quantize_rows));
  m.impl("pack_lowbit", TORCH_BOX(&ow::pack_lowbit_op));
  m.impl("unpack_lowbit", TORCH_BOX(&ow::unpack_lowbit_op));
}
