// The transform in terms of simd/vec.h; each tier compiles it once.
//
// Stages h < kLanes exchange lanes of a vector; later ones add and subtract vectors, up to
// log2(kVectors) of them between a load and a store.
#pragma once

#include "kernels/hadamard/hadamard.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// Vectors that a pass holds: half the registers, so that the others keep signs and halves of pairs.
constexpr int64_t kVectors = kLanes == 16 ? 16 : 8;

// Row s: the sign of a lane's own element in stage 2^s.
constexpr float kSigns[4][16] = {{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                                 {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                                 {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                                 {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};

// Stages kDistance .. min(block, kLanes) / 2. A product with one is exact.
template <int kDistance = 1>
OW_INLINE VecF lane_stages(VecF v, int64_t block) {
  if constexpr (kDistance < kLanes) {
    if (block > kDistance) {
      const VecF signs = load(kSigns[__builtin_ctz(kDistance)]);
      v = lane_stages<2 * kDistance>(fma(signs, v, swap_lanes<kDistance>(v)), block);
    }
  }
  return v;
}

// Blocks shorter than a vector, several in one.
template <class T>
void short_blocks(const HadamardArgs& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t count = end * a.block;
  for (int64_t i = begin * a.block; i < count; i += kLanes) {
    const int64_t lanes = min_of(kLanes, count - i);
    store_n(y + i, mul(lane_stages(load_n(x + i, lanes), a.block), set1(a.scale)), lanes);
  }
}

// Stages h = stride, 2 stride .. kCount / 2 * stride of kCount vectors, and, if `stride` is one
// vector, the lanes' stages before them.
template <int64_t kCount, bool kFirst, bool kLast, class From, class To>
OW_INLINE void pass_of(const From* from, To* to, int64_t stride, VecF scale) {
  VecF v[kCount];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kCount; ++i) {
    v[i] = load(from + i * stride);
    if constexpr (kFirst) v[i] = lane_stages(v[i], kLanes);
  }
#pragma GCC unroll 4
  for (int64_t h = 1; h < kCount; h *= 2) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kCount; ++i) {
      if ((i & h) != 0) continue;
      const VecF low = v[i];
      v[i] = add(low, v[i + h]);
      v[i + h] = sub(low, v[i + h]);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kCount; ++i) {
    store(to + i * stride, kLast ? mul(v[i], scale) : v[i]);
  }
}

template <int64_t kCount, bool kFirst, bool kLast, class From, class To>
void pass_over(const HadamardArgs& a, const From* from, To* to, int64_t stride) {
  const VecF scale = set1(a.scale);
  for (int64_t i = 0; i < a.block; i += kCount * stride) {
    for (int64_t j = 0; j < stride; j += kLanes) {
      pass_of<kCount, kFirst, kLast>(from + i + j, to + i + j, stride, scale);
    }
  }
}

// One pass of `count` vectors, at most kVectors.
template <bool kFirst, bool kLast, class From, class To>
void pass(const HadamardArgs& a, int64_t count, const From* from, To* to, int64_t stride) {
  switch (count) {
    case 1: return pass_over<1, kFirst, kLast>(a, from, to, stride);
    case 2: return pass_over<2, kFirst, kLast>(a, from, to, stride);
    case 4: return pass_over<4, kFirst, kLast>(a, from, to, stride);
    case 8: return pass_over<8, kFirst, kLast>(a, from, to, stride);
    default: return pass_over<kVectors, kFirst, kLast>(a, from, to, stride);
  }
}

template <class T>
void long_blocks(const HadamardArgs& a, int64_t begin, int64_t end) {
  alignas(64) float scratch[kMaxHadamard];
  const int64_t vectors = a.block / kLanes;
  for (int64_t b = begin; b < end; ++b) {
    const T* x = static_cast<const T*>(a.x) + b * a.block;
    T* y = static_cast<T*>(a.y) + b * a.block;
    if (vectors <= kVectors) {
      pass<true, true>(a, vectors, x, y, kLanes);
      continue;
    }
    pass<true, false>(a, kVectors, x, scratch, kLanes);
    int64_t stride = kLanes * kVectors;
    for (; stride * kVectors < a.block; stride *= kVectors) {
      pass<false, false>(a, kVectors, scratch, scratch, stride);
    }
    pass<false, true>(a, a.block / stride, scratch, y, stride);
  }
}

template <class T>
void transform_typed(const HadamardArgs& a, int64_t begin, int64_t end) {
  if (a.block < kLanes) {
    short_blocks<T>(a, begin, end);
  } else {
    long_blocks<T>(a, begin, end);
  }
}

OW_INLINE void transform(const HadamardArgs& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case FloatType::f32: return transform_typed<float>(a, begin, end);
    case FloatType::bf16: return transform_typed<bf16>(a, begin, end);
    case FloatType::f16: return transform_typed<f16>(a, begin, end);
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
