// One lane of everything: the tier every other tier is tested against.
#pragma once

#include "core/types.h"

namespace ow::scalar {
namespace {

constexpr int64_t kLanes = 1;
struct VecF {
  float v;
};
struct VecI {
  int32_t v;
};

template <class T>
OW_INLINE VecF load(const T* p) {
  return {to_float(*p)};
}
template <class T>
OW_INLINE VecF load_n(const T* p, int64_t n) {
  return {n > 0 ? to_float(*p) : 0.0f};
}
OW_INLINE VecI load(const int32_t* p) { return {*p}; }
OW_INLINE VecF gather(const float* table, VecI at) { return {table[at.v]}; }
template <class T>
OW_INLINE void store(T* p, VecF a) {
  from_float(a.v, p);
}
template <class T>
OW_INLINE void store_n(T* p, VecF a, int64_t n) {
  if (n > 0) from_float(a.v, p);
}
OW_INLINE void store_i8(int8_t* p, VecI a) { *p = int8_t(a.v); }
OW_INLINE void store_i8_n(int8_t* p, VecI a, int64_t n) {
  if (n > 0) *p = int8_t(a.v);
}

OW_INLINE VecF set1(float v) { return {v}; }
OW_INLINE VecI set1(int32_t v) { return {v}; }
OW_INLINE VecF add(VecF a, VecF b) { return {a.v + b.v}; }
OW_INLINE VecF sub(VecF a, VecF b) { return {a.v - b.v}; }
OW_INLINE VecF mul(VecF a, VecF b) { return {a.v * b.v}; }
OW_INLINE VecF fma(VecF a, VecF b, VecF c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }
OW_INLINE VecF div_(VecF a, VecF b) { return {a.v / b.v}; }
OW_INLINE VecF max_(VecF a, VecF b) { return {a.v > b.v ? a.v : b.v}; }
OW_INLINE VecI add(VecI a, VecI b) { return {a.v + b.v}; }
OW_INLINE VecI sub(VecI a, VecI b) { return {a.v - b.v}; }
OW_INLINE VecI max_(VecI a, VecI b) { return {a.v > b.v ? a.v : b.v}; }
OW_INLINE VecI bit_and(VecI a, VecI b) { return {a.v & b.v}; }
OW_INLINE VecI shift_left(VecI a, int n) { return {int32_t(uint32_t(a.v) << n)}; }
OW_INLINE VecI shift_right(VecI a, int n) { return {a.v >> n}; }

// Nearest even without a library call: adding 2^23 pushes the fraction out of the mantissa. (Not
// 1.5 * 2^23, which serves both signs but loses the halves that fp32 has up to 2^23.)
OW_INLINE VecI to_int(VecF a) {
  if (__builtin_fabsf(a.v) >= 8388608.0f) return {int32_t(a.v)};
  const float magic = __builtin_copysignf(8388608.0f, a.v);
  return {int32_t((a.v + magic) - magic)};
}
OW_INLINE VecF to_float(VecI a) { return {float(a.v)}; }
OW_INLINE VecF as_float(VecI a) { return {bits_to_float(uint32_t(a.v))}; }
OW_INLINE VecI as_int(VecF a) { return {int32_t(float_to_bits(a.v))}; }
OW_INLINE VecI abs_bits(VecF a) { return {int32_t(float_to_bits(a.v) & 0x7fffffff)}; }

// There is no other lane.
template <int kDistance>
OW_INLINE VecF swap_lanes(VecF a) {
  return a;
}
OW_INLINE void transpose(VecF (&)[1]) {}
OW_INLINE VecF sums_of(VecF (&rows)[1]) { return rows[0]; }

OW_INLINE float sum(VecF a) { return a.v; }
OW_INLINE int32_t sum(VecI a) { return a.v; }
OW_INLINE float max_of_lanes(VecF a) { return a.v; }
OW_INLINE int32_t max_of_lanes(VecI a) { return a.v; }

}  // namespace
}  // namespace ow::scalar
