// Checks of what tensors hold. They read it all, so only operators that pack make them. Operators
// for GPUs look there, and fail with the same words.
#pragma once

#include "ops/glue.h"

namespace ow {

[[noreturn]] inline void fail_code(const char* op, const char* name, int64_t bits, int code) {
  fail(op, ": ", name, " must be in 0 .. ", (1 << bits) - 1, " for ", bits, " bits, got ", code);
}
[[noreturn]] inline void fail_scale(const char* op, float value, int64_t element) {
  fail(op, ": scales must be finite, got ", value, " at element ", element);
}

// Codes of `bits` bits, one a byte; `tensor` is contiguous uint8.
inline void check_codes(const char* op, const char* name, const Tensor& tensor, int64_t bits) {
  const uint8_t* values = static_cast<const uint8_t*>(tensor.const_data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    if (values[i] >> bits != 0) [[unlikely]]
      fail_code(op, name, bits, values[i]);
  }
}

// `scales` is contiguous, of a float type.
inline void check_finite(const char* op, const Tensor& scales) {
  for (int64_t i = 0; i < scales.numel(); ++i) {
    const float value = read_float(scales.const_data_ptr(), float_type(scales), i);
    if ((float_to_bits(value) & 0x7fffffff) >= 0x7f800000) [[unlikely]]
      fail_scale(op, value, i);
  }
}

}  // namespace ow
