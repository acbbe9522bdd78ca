// c [rows, 64] (+)= sum_s a_s [rows, depth] * b_s [depth, 64], in terms of the types of an engine:
//
//   Column              kLanes of the right side's 64, kPair deep; load_column reads one
//   broadcast           kPair elements of the left side, to all lanes
//   accumulate          adds their products to a vector of sums
//   kVectors, kRows     vectors of columns and rows of the left side whose sums are in registers
#pragma once

#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kMaxTileUnits = 8;

template <class Element>
struct Product {
  const Element* a[kMaxTileUnits];  // of each segment
  int64_t segments;
  int64_t rows, row_stride;  // of a, in elements
  int64_t depth;             // of a segment
  const Element* b;
  float* c;
  bool add;
  int64_t queries;  // lanes worth computing, a multiple of 16
};

// Every loop over sums is unrolled, or gcc 12 keeps them in memory.
template <class E, int kR, int kV>
void multiply_rows(const Product<typename E::Element>& p, int64_t row, int64_t lane) {
  float* c = p.c + row * kQueryTile + lane;
  VecF sums[kR][kV];
  if (p.add) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sums[r][v] = load(c + r * kQueryTile + v * kLanes);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) sums[r][v] = set1(0.0f);
    }
  }
  const typename E::Element* b = p.b + lane * E::kPair;
  for (int64_t s = 0; s < p.segments; ++s) {
    const typename E::Element* a = p.a[s] + row * p.row_stride;
    for (int64_t i = 0; i < p.depth; i += E::kPair, b += kQueryTile * E::kPair) {
      typename E::Column columns[kV];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) columns[v] = E::load_column(b + v * kLanes * E::kPair);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const typename E::Column left = E::broadcast(a + r * p.row_stride + i);
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) E::accumulate(sums[r][v], left, columns[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) store(c + r * kQueryTile + v * kLanes, sums[r][v]);
  }
}

template <class E, int kV>
void multiply_lanes(const Product<typename E::Element>& p, int64_t lane) {
  // Few columns leave registers for more rows, of which then none are left over.
  constexpr int kR = 2 * kV <= E::kVectors ? 8 : E::kRows;
  int64_t row = 0;
  for (; row + kR <= p.rows; row += kR) multiply_rows<E, kR, kV>(p, row, lane);
  // 32 keys, or dimensions in multiples of 16: an even number is left.
  if (p.rows - row == 4) multiply_rows<E, 4, kV>(p, row, lane);
  if (p.rows - row == 2) multiply_rows<E, 2, kV>(p, row, lane);
}

template <class E>
void multiply(const Product<typename E::Element>& p) {
  constexpr int64_t kStep = E::kVectors * kLanes;
  int64_t lane = 0;
  for (; lane + kStep <= p.queries; lane += kStep) multiply_lanes<E, E::kVectors>(p, lane);
  if constexpr (kStep > 16) {
    switch (p.queries - lane) {
      case 16: return multiply_lanes<E, 1>(p, lane);
      case 32: return multiply_lanes<E, 2>(p, lane);
      case 48: return multiply_lanes<E, 3>(p, lane);
    }
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
