#include "ops/nm_gemm.h"

#include "ops/values.h"

namespace ow {
namespace {

Tensor nm_linear(const Tensor& x, const Tensor& values, const Tensor& index,
                 const std::optional<Tensor>& scales, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& add, int64_t layout, int64_t n, int64_t k,
                 int64_t kept, int64_t block, int64_t vector, int64_t group_size, int64_t compute) {
  const auto multiply = [&](NmGemmArgs& args) {
    OW_CHECK(args.bits != 16 || args.value_type == FloatType::bf16,
             "nm_linear: values must be bfloat16 on the CPU, got float16; a GPU takes both");
    const Isa isa = active_isa();
    const Parallel parallel = torch_parallel();
    const int64_t code_bytes = args.int8 ? args.m * k : 0;
    const Workspace workspace(Scratch::bytes_for(nm_laid_bytes(args, isa)) +
                              Scratch::bytes_for(code_bytes) + Scratch::bytes_for(args.m * 4));
    Scratch scratch = workspace.scratch();
    args.laid = scratch.take<uint8_t>(nm_laid_bytes(args, isa));
    if (args.int8) {
      int8_t* codes = scratch.take<int8_t>(code_bytes);
      const EncodeArgs encode = nm_encode_args(args, codes, scratch.take<float>(args.m));
      encode_rows(encode, isa, parallel);
      args.x = encode.codes;
      args.x_scales = encode.scales;
    }
    nm_gemm(args, isa, parallel);
  };
  return nm_linear_by(x, values, index, or_null(scales), or_null(bias), or_null(add), layout, n, k,
                      kept, block, vector, group_size, compute, multiply);
}

std::tuple<Tensor, Tensor, Tensor> compress_nm_op(const Tensor& weight,
                                                  const std::optional<Tensor>& mask,
                                                  const std::optional<Tensor>& scales, int64_t kept,
                                                  int64_t block, int64_t vector, int64_t bits,
                                                  int64_t group_size) {
  constexpr const char* kOp = "compress_nm";
  const auto check = [&](const NmPackArgs& args, const Tensor& codes, const Tensor* grid) {
    if (grid != nullptr) {
      check_codes(kOp, "weight", codes, bits);
      check_finite(kOp, *grid);
    }
    const NmExcess excess = find_nm_excess(args);
    if (excess.count != 0) fail_nm_excess(kOp, args, excess);
  };
  const auto pack = [](const NmPackArgs& args, void* values, uint8_t* index, void* packed_scales) {
    compress_nm(args, values, index, packed_scales, torch_parallel());
  };
  return compress_nm_by(weight, or_null(mask), or_null(scales), kept, block, vector, bits,
                        group_size, check, pack);
}

std::tuple<Tensor, Tensor> expand_nm_op(const Tensor& values, const Tensor& index,
                                        const std::optional<Tensor>& scales, int64_t layout,
                                        int64_t n, int64_t k, int64_t kept, int64_t block,
                                        int64_t vector, int64_t group_size) {
  const auto expand = [](const NmPackArgs& args, const void* packed, const uint8_t* lanes,
                         const void* packed_scales, void* weight, void* flat_scales) {
    expand_nm(args, packed, lanes, packed_scales, weight, flat_scales, torch_parallel());
  };
  return expand_nm_by(values, index, or_null(scales), layout, n, k, kept, block, vector, group_size,
                      expand);
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(ow::kNmLinearSchema);
  m.def(ow::kCompressNmSchema);
  m.def(ow::kExpandNmSchema);
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("nm_linear", TORCH_BOX(&ow::nm_linear));
  m.impl("compress_nm", TORCH_BOX(&ow::compress_nm_op));
  m.impl("expand_nm", TORCH_BOX(&ow::expand_nm_op));
}
