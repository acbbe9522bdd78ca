// Storage types and small helpers every layer may use. Freestanding: no C++ library header, because
// ISA translation units include this file and must not emit code the linker could share between
// tiers.
#pragma once

#include <stdint.h>
#include <string.h>
#ifndef OW_INLINE  // cuda/device.h has its own for nvcc
#define OW_INLINE static inline __attribute__((always_inline))
#endif
#define OW_RESTRICT __restrict__
namespace ow {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class FloatType : int32_t { f32, bf16, f16 };

OW_INLINE int64_t float_size(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

// Of the stored values of a weight.
enum class ValueType : int32_t { f32, bf16, i8 };

OW_INLINE int64_t value_size(ValueType type) {
  return type == ValueType::f32 ? 4 : type == ValueType::bf16 ? 2 : 1;
}

OW_INLINE int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
OW_INLINE int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }
OW_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

OW_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
OW_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

OW_INLINE float to_float(float value) { return value; }
OW_INLINE float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
OW_INLINE float to_float(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // The same mantissa under fp32's bias is 2^112 too small; this also normalizes subnormals.
  const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
  return bits_to_float(sign | float_to_bits(scaled));
}

// Round to nearest even; NaN stays NaN.
OW_INLINE void from_float(float value, float* out) { *out = value; }
OW_INLINE void from_float(float value, bf16* out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out->bits = uint16_t((bits >> 16) | 0x40);
  } else {
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
OW_INLINE void from_float(float value, f16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  uint16_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 aligns the subnormal's last bit
    result = uint16_t(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  } else {
    result = uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
  }
  out->bits = uint16_t(result | sign);
}

// Element i of an array whose type is known at run time only.
OW_INLINE float read_float(const void* p, FloatType type, int64_t i) {
  switch (type) {
    case FloatType::f32: return static_cast<const float*>(p)[i];
    case FloatType::bf16: return to_float(static_cast<const bf16*>(p)[i]);
    default: return to_float(static_cast<const f16*>(p)[i]);
  }
}
OW_INLINE float read_value(const void* p, ValueType type, int64_t i) {
  switch (type) {
    case ValueType::f32: return static_cast<const float*>(p)[i];
    case ValueType::bf16: return to_float(static_cast<const bf16*>(p)[i]);
    default: return float(static_cast<const int8_t*>(p)[i]);
  }
}
OW_INLINE void write_float(void* p, FloatType type, int64_t i, float value) {
  switch (type) {
    case FloatType::f32: return from_float(value, static_cast<float*>(p) + i);
    case FloatType::bf16: return from_float(value, static_cast<bf16*>(p) + i);
    default: return from_float(value, static_cast<f16*>(p) + i);
  }
}

}  // namespace ow
