// Merging of attention states in terms of simd/vec.h; each tier compiles it once.
#pragma once

#include "kernels/merge_states/merge_states.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

template <class T>
void blend(const T* o1, float weight1, const T* o2, float weight2, int64_t d, T* o) {
  for (int64_t i = 0; i < d; i += kLanes) {
    const VecF first = mul(set1(weight1), load_n(o1 + i, d - i));
    store_n(o + i, fma(set1(weight2), load_n(o2 + i, d - i), first), d - i);
  }
}

template <class T>
void merge_rows(const MergeStatesArgs& a, int64_t begin, int64_t end) {
  constexpr float kNothing = -__builtin_inff();
  for (int64_t r = begin; r < end; ++r) {
    const T* o1 = static_cast<const T*>(a.o1) + r * a.d;
    const T* o2 = static_cast<const T*>(a.o2) + r * a.d;
    T* o = static_cast<T*>(a.o) + r * a.d;
    const float lse1 = a.lse1[r];
    const float lse2 = a.lse2[r];
    if (lse1 == kNothing && lse2 == kNothing) {
      memset(o, 0, size_t(a.d) * sizeof(T));
      a.lse[r] = kNothing;
    } else if (lse1 == kNothing || lse2 == kNothing) {
      memcpy(o, lse2 == kNothing ? o1 : o2, size_t(a.d) * sizeof(T));
      a.lse[r] = lse2 == kNothing ? lse1 : lse2;
    } else {
      const float larger = lse1 >= lse2 ? lse1 : lse2;
      const float e1 = __builtin_expf(lse1 - larger);
      const float e2 = __builtin_expf(lse2 - larger);
      blend(o1, e1 / (e1 + e2), o2, e2 / (e1 + e2), a.d, o);
      a.lse[r] = larger + __builtin_logf(e1 + e2);
    }
  }
}

void merge(const MergeStatesArgs& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case FloatType::f32: return merge_rows<float>(a, begin, end);
    case FloatType::bf16: return merge_rows<bf16>(a, begin, end);
    case FloatType::f16: return merge_rows<f16>(a, begin, end);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
