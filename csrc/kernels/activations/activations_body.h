// The elementwise kernels in terms of simd/vec.h; each activations_<tier>.cpp compiles them once.
#pragma once

#include "kernels/activations/activations.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Calls body(i, lanes) over [0, n): whole vectors, then the rest.
template <class Body>
OW_INLINE void each_vector(int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += kLanes) body(i, min_of(kLanes, n - i));
}
template <class T>
OW_INLINE VecF load_up_to(const T* p, int64_t lanes) {
  return lanes == kLanes ? load(p) : load_n(p, lanes);
}
template <class T>
OW_INLINE void store_up_to(T* p, VecF value, int64_t lanes) {
  if (lanes == kLanes) {
    store(p, value);
  } else {
    store_n(p, value, lanes);
  }
}

template <class T>
void rms_norm_rows(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(a.w);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.d;
    T* y = static_cast<T*>(a.y) + row * a.d;
    VecF squares = set1(0.0f);
    each_vector(a.d, [&](int64_t i, int64_t lanes) {
      const VecF v = load_up_to(x + i, lanes);
      squares = fma(v, v, squares);
    });
    const VecF factor = set1(1.0f / __builtin_sqrtf(sum(squares) / float(a.d) + a.eps));
    each_vector(a.d, [&](int64_t i, int64_t lanes) {
      const VecF scaled = mul(load_up_to(x + i, lanes), factor);
      store_up_to(y + i, mul(scaled, load_up_to(w + i, lanes)), lanes);
    });
  }
}

template <class T>
void silu_mul_rows(const SiluMulArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.d;
    T* y = static_cast<T*>(a.y) + row * a.d;
    each_vector(a.d, [&](int64_t i, int64_t lanes) {
      // silu(-87) is as good as any gate below it: -1e-36, where fp32 has little left. As the
      // second argument of max_ a NaN stays.
      const VecF g = max_(set1(-87.0f), load_up_to(gate + i, lanes));
      const VecF u = load_up_to(gate + a.d + i, lanes);
      const VecF e = exp_(sub(set1(0.0f), g));
      store_up_to(y + i, mul(div_(g, add(set1(1.0f), e)), u), lanes);
    });
  }
}

template <class T>
void rope_rows(const RopeArgs& a, int64_t begin, int64_t end) {
  const int64_t half = a.d / 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.t;
    const int64_t t = row % a.t;
    for (int64_t h = 0; h < a.h; ++h) {
      const HeadStrides& from = a.x_strides;
      const HeadStrides& to = a.y_strides;
      const T* x = static_cast<const T*>(a.x) + b * from.b + t * from.t + h * from.h;
      T* y = static_cast<T*>(a.y) + b * to.b + t * to.t + h * to.h;
      if (h >= a.turned) {
        memcpy(y, x, size_t(a.d) * sizeof(T));
        continue;
      }
      each_vector(half, [&](int64_t i, int64_t lanes) {
        const VecF c = load_up_to(a.cos + t * half + i, lanes);
        const VecF s = load_up_to(a.sin + t * half + i, lanes);
        const VecF low = load_up_to(x + i, lanes);
        const VecF high = load_up_to(x + half + i, lanes);
        store_up_to(y + i, sub(mul(low, c), mul(high, s)), lanes);
        store_up_to(y + half + i, add(mul(high, c), mul(low, s)), lanes);
      });
    }
  }
}

#define OW_BY_TYPE(function)                                    \
  switch (a.type) {                                             \
    case FloatType::f32: return function<float>(a, begin, end); \
    case FloatType::bf16: return function<bf16>(a, begin, end); \
    case FloatType::f16: return function<f16>(a, begin, end);   \
  }
void rms_norm_any(const RmsNormArgs& a, int64_t begin, int64_t end) { OW_BY_TYPE(rms_norm_rows) }
void silu_mul_any(const SiluMulArgs& a, int64_t begin, int64_t end) { OW_BY_TYPE(silu_mul_rows) }
void rope_any(const RopeArgs& a, int64_t begin, int64_t end) { OW_BY_TYPE(rope_rows) }
#undef OW_BY_TYPE

}  // namespace
}  // namespace ow::OW_TARGET
