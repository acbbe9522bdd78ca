// quantize_rows between its argument and an encoder: what its operators on the CPU and on a GPU
// share.
#pragma once

#include <tuple>

#include "kernels/quantize/quantize.h"
#include "ops/glue.h"

namespace ow {

constexpr const char* kQuantizeRowsSchema =
    "quantize_rows(Tensor x) -> (Tensor codes, Tensor scales)";

// encode(const EncodeArgs&) encodes at least one row.
template <class Encode>
std::tuple<Tensor, Tensor> quantize_rows_by(const Tensor& x_any, const Encode& encode) {
  constexpr const char* kOp = "quantize_rows";
  check_float(kOp, "x", x_any);
  OW_CHECK(x_any.dim() >= 1 && x_any.size(-1) >= 1, kOp,
           ": x must have a last dimension of at least 1, got ", shape_text(x_any));
  const int64_t k = x_any.size(-1);
  const int64_t m = x_any.numel() / k;
  const Tensor x = as_contiguous(x_any);
  Tensor codes = empty_with_last(kOp, x, k, ScalarType::Char);
  int64_t sizes[kMaxDim];
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes[i] = x.size(i);
  Tensor scales = fast_empty(sizes, x.dim() - 1, ScalarType::Float, place_of(x));
  if (m == 0) return {codes, scales};
  EncodeArgs args{};
  args.m = m;
  args.k = args.group_size = args.stride_x = k;
  args.digits = 1;
  constexpr int64_t kTogether = 16;  // the least that blocks take
  args.blocks = {1, kTogether, k};
  args.x_type = float_type(x);
  args.x = x.const_data_ptr();
  args.codes = static_cast<int8_t*>(codes.mutable_data_ptr());
  args.scales = static_cast<float*>(scales.mutable_data_ptr());
  encode(args);
  return {codes, scales};
}

}  // namespace ow
