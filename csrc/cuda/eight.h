// Eight neighbours of a row, which a thread reads at once: 16 bytes of a 16-bit type.
#pragma once

#include "core/types.h"
#include "cuda/ptx.h"

namespace ow {

constexpr int kEight = 8;

// Two neighbours of a 16-bit type, the first in the low half.
OW_DEVICE void unpack(uint32_t pair, const bf16*, float* v) {
  v[0] = bits_to_float(pair << 16);
  v[1] = bits_to_float(pair & 0xffff0000u);
}
OW_DEVICE void unpack(uint32_t pair, const f16*, float* v) {
  v[0] = ptx::cvt_f32_f16(uint16_t(pair));
  v[1] = ptx::cvt_f32_f16(uint16_t(pair >> 16));
}
OW_DEVICE uint32_t pack(float low, float high, const bf16*) {
  return ptx::cvt_rn_bf16x2_f32(high, low);
}
OW_DEVICE uint32_t pack(float low, float high, const f16*) {
  return ptx::cvt_rn_f16x2_f32(high, low);
}

OW_DEVICE void read_aligned(const float* x, float (&v)[kEight]) {
  OW_UNROLL
  for (int i = 0; i < kEight; i += 4) {
    const uint4 bits = *reinterpret_cast<const uint4*>(x + i);
    v[i] = bits_to_float(bits.x);
    v[i + 1] = bits_to_float(bits.y);
    v[i + 2] = bits_to_float(bits.z);
    v[i + 3] = bits_to_float(bits.w);
  }
}
template <class T>
OW_DEVICE void read_aligned(const T* x, float (&v)[kEight]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(x);
  unpack(bits.x, x, v);
  unpack(bits.y, x, v + 2);
  unpack(bits.z, x, v + 4);
  unpack(bits.w, x, v + 6);
}

// Zeros past `count`.
template <class T>
OW_DEVICE void read_eight(const T* x, int64_t count, float (&v)[kEight]) {
  constexpr int kAlignment = 16;
  if (uintptr_t(x) % kAlignment == 0 && count >= kEight) return read_aligned(x, v);
  OW_UNROLL
  for (int i = 0; i < kEight; ++i) v[i] = i < count ? to_float(x[i]) : 0.0f;
}

}  // namespace ow
