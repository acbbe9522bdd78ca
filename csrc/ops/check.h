// Argument checks of the op layer. Messages read
//
//   <op>: <argument> <expected>, got <actual>[; <what to do>]
//
// and reach Python as ValueError (std::invalid_argument), without the source path that torch's own
// check macro prepends. They run before any parallel region: an error raised inside one would lose
// its text.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace ow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

#define OW_CHECK(condition, ...)   \
  do {                             \
    if (!(condition)) [[unlikely]] \
      ow::fail(__VA_ARGS__);       \
  } while (false)

inline void check_range(const char* op, const char* name, int64_t value, int64_t least,
                        int64_t most) {
  OW_CHECK(value >= least && value <= most, op, ": ", name, " must be in ", least, " .. ", most,
           ", got ", value);
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline void check_defined(const char* op, const char* name, const Tensor& tensor) {
  OW_CHECK(tensor.defined(), op, ": ", name, " must be a tensor, got None");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType want) {
  check_defined(op, name, tensor);
  OW_CHECK(tensor.scalar_type() == want, op, ": ", name, " must be ", dtype_name(want), ", got ",
           dtype_name(tensor.scalar_type()));
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline void check_float(const char* op, const char* name, const Tensor& tensor) {
  check_defined(op, name, tensor);
  OW_CHECK(is_float(tensor.scalar_type()), op, ": ", name,
           " must be float32, bfloat16 or float16, got ", dtype_name(tensor.scalar_type()));
}

template <size_t N>
void check_shape(const char* op, const char* name, const Tensor& tensor, const int64_t (&want)[N]) {
  bool same = tensor.dim() == int64_t(N);
  for (size_t i = 0; same && i < N; ++i) same = tensor.size(int64_t(i)) == want[i];
  if (same) return;
  std::ostringstream expected;
  for (size_t i = 0; i < N; ++i) expected << (i ? ", " : "") << want[i];
  fail(op, ": ", name, " must have shape [", expected.str(), "], got ", shape_text(tensor));
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

// The elements of the last dimension must lie together.
inline void check_last_stride(const char* op, const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  OW_CHECK(tensor.stride(last) == 1 || tensor.size(last) == 1, op, ": ", name,
           " must have a last stride of 1, got ", tensor.stride(last));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  OW_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides of a view; ",
           "call .contiguous()");
}

// A contiguous tensor of that dtype and shape.
template <size_t N>
void check_operand(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                   const int64_t (&shape)[N]) {
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, shape);
  check_contiguous(op, name, tensor);
}

}  // namespace ow
