// Two codes of a register as the two 16-bit floats of another: what dequantizing in registers takes
// before the scale. Exact.
#pragma once

#include "core/types.h"
#include "cuda/ptx.h"

namespace ow {

// For the functions below: bytes i and j of a register.
OW_DEVICE uint32_t byte_pair(uint32_t i, uint32_t j) { return 0x4040 | i | j << 8; }

template <class T>
struct CodePairs;

// A byte u below 0x64, the high byte of 1024 in fp16, is 1024 + u.
template <>
struct CodePairs<f16> {
  // codes - zero, for codes of 4 or 8 bits; the low half is byte i. zero is at most 255.
  template <int kBits>
  static OW_DEVICE uint32_t less(uint32_t codes, uint32_t bytes, uint32_t zero) {
    return ptx::sub_f16x2(ptx::prmt_b32(codes, 0x64646464, bytes), 0x64006400 + zero * 0x10001);
  }
};

// In bf16, whose last bit is 1 at 128 only, that serves codes below 128; wider ones pass by fp32,
// where a byte below 2^23 is 2^23 + u, and whose high halves are the bf16.
template <>
struct CodePairs<bf16> {
  template <int kBits>
  static OW_DEVICE uint32_t less(uint32_t codes, uint32_t bytes, uint32_t zero) {
    if constexpr (kBits < 8) {
      constexpr uint32_t kOnes = 0x3f803f80;
      return ptx::fma_rn_bf16x2(ptx::prmt_b32(codes, 0x43434343, bytes), kOnes,
                                0xc300c300 + zero * 0x10001);
    } else {
      const float offset = 0x1p23f + float(zero);
      uint32_t halves[2];
      OW_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t byte = bytes >> (8 * i) & 3;
        const uint32_t wide = ptx::prmt_b32(codes, 0x4b000000, 0x7440 | byte);
        halves[i] = float_to_bits(bits_to_float(wide) - offset);
      }
      return ptx::prmt_b32(halves[0], halves[1], 0x7632);
    }
  }
};

}  // namespace ow
