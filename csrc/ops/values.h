// Checks of what tensors hold. They read it all, so only operators that pack make them.
#pragma once

#include "ops/glue.h"

namespace ow {

// Codes of `bits` bits, one a byte; `tensor` is contiguous uint8.
inline void check_codes(const char* op, const char* name, const Tensor& tensor, int64_t bits) {
  const uint8_t* values = static_cast<const uint8_t*>(tensor.const_data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    OW_CHECK(values[i] >> bits == 0, op, ": ", name, " must be in 0 .. ", (1 << bits) - 1, " for ",
             bits, " bits, got ", int(values[i]));
  }
}

// `scales` is contiguous, of a float type.
inline void check_finite(const char* op, const Tensor& scales) {
  for (int64_t i = 0; i < scales.numel(); ++i) {
    const float value = read_float(scales.const_data_ptr(), float_type(scales), i);
    OW_CHECK((float_to_bits(value) & 0x7fffffff) < 0x7f800000, op, ": scales must be finite, got ",
             value, " at element ", i);
  }
}

}  // namespace ow
