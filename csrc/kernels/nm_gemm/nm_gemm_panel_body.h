// Many rows of x, in terms of simd/vec.h. x is transposed into panels of tokens, [columns][tokens],
// so that a stored weight is one broadcast times one row of a panel: a load and an FMA for a vector
// of tokens, no gather, and the index is decoded once for all of them.
#pragma once

#include "kernels/nm_gemm/nm_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

// Vectors of tokens in a panel. Each FMA of a weight of its own takes a load, and loads bind: the
// broadcast of the weight is one of 9.
constexpr int64_t kPanelVectors = 8;
// Outputs whose sums stay in L2 (256 KiB with 16 lanes) while x goes by. Half as many took 7 %
// longer: x comes from L3 that much more often.
constexpr int64_t kOutputPanels = 32;
constexpr int64_t kOutputs = kOutputPanels * kNmPanel;
// Columns of a panel of x that are multiplied at a time: 32 KiB, which stay in L1.
constexpr int64_t kColumns = 1024 / kLanes;
// Outputs with one index that share a row of x in registers: with 4 vectors of tokens, 8 loads
// make 16 products.
constexpr int64_t kShared = 4;

// The panels of tokens: vectors [begin, end) of each, split evenly.
struct Tokens {
  int64_t begin, end;
  int64_t stride() const { return (end - begin) * kLanes; }
};
OW_INLINE int64_t token_vectors(const NmGemmArgs& a) { return div_up(a.m, kLanes); }
OW_INLINE int64_t token_panels(const NmGemmArgs& a) {
  return div_up(token_vectors(a), kPanelVectors);
}
OW_INLINE Tokens token_panel(const NmGemmArgs& a, int64_t i) {
  const int64_t vectors = token_vectors(a);
  const int64_t panels = token_panels(a);
  return {vectors * i / panels, vectors * (i + 1) / panels};
}
OW_INLINE float* laid_panel(const NmGemmArgs& a, const Tokens& tokens) {
  return static_cast<float*>(a.laid) + tokens.begin * kLanes * nm_columns(a);
}

int64_t laid_panel_bytes(const NmGemmArgs& a) {
  return token_vectors(a) * kLanes * nm_columns(a) * int64_t(sizeof(float));
}

// A vector of tokens, transposed into its place in a panel. Tokens past m are zero.
template <class T>
void lay_out_vector(const NmGemmArgs& a, int64_t vector) {
  int64_t i = 0;
  while (token_panel(a, i).end <= vector) ++i;
  const Tokens tokens = token_panel(a, i);
  float* out = laid_panel(a, tokens) + (vector - tokens.begin) * kLanes;
  const int64_t rows = min_of(kLanes, a.m - vector * kLanes);
  const T* x = static_cast<const T*>(a.x) + vector * kLanes * a.k;
  const int64_t stride = tokens.stride();
  int64_t k = 0;
  if (rows == kLanes) {
    for (; k + kLanes <= a.k; k += kLanes) {
      VecF tile[kLanes];
      for (int64_t t = 0; t < kLanes; ++t) tile[t] = load(x + t * a.k + k);
      transpose(tile);
      for (int64_t j = 0; j < kLanes; ++j) store(out + (k + j) * stride, tile[j]);
    }
  }
  for (; k < nm_columns(a); ++k) {
    for (int64_t t = 0; t < kLanes; ++t) {
      out[k * stride + t] = t < rows && k < a.k ? ow::to_float(x[t * a.k + k]) : 0.0f;
    }
  }
}

void lay_out_vectors(const NmGemmArgs& a, int64_t begin, int64_t end) {
  for (int64_t vector = begin; vector < end; ++vector) {
    switch (a.y_type) {
      case FloatType::f32: lay_out_vector<float>(a, vector); break;
      case FloatType::bf16: lay_out_vector<bf16>(a, vector); break;
      case FloatType::f16: lay_out_vector<f16>(a, vector); break;
    }
  }
}

// sums[kRows][stride] += weights of the kRows outputs from `lane` on times kVectors vectors of
// tokens. Outputs with one index (kOneIndex) share the rows of x. Its own function, with every size
// a template argument, so that the sums stay in registers.
template <int kRows, int kVectors, bool kOneIndex>
__attribute__((noinline)) void multiply_outputs(const float* x, const Tile& tile, Slots slots,
                                                int64_t lane, float* sums, int64_t stride) {
  VecF acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(sums + r * stride + v * kLanes);
  }
  for (int64_t s = slots.begin; s < slots.end; ++s) {
    if constexpr (kOneIndex) {
      const float* row = x + tile.columns[s][lane];
      VecF w[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) w[r] = set1(tile.weights[s][lane + r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const VecF xv = load(row + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(xv, w[r], acc[r][v]);
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float* row = x + tile.columns[s][lane + r];
        const VecF w = set1(tile.weights[s][lane + r]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(load(row + v * kLanes), w, acc[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(sums + r * stride + v * kLanes, acc[r][v]);
  }
}

using MultiplyFn = void (*)(const float*, const Tile&, Slots, int64_t, float*, int64_t);

// What comes next, where no prefetcher looks: the packed weight of the next tile, and a panel's
// share of x of the next step. Waiting for them took a third of the time; so each group of outputs
// fetches some.
struct Ahead {
  const uint8_t* values;
  int64_t value_bytes;
  const uint8_t* x;
  int64_t x_bytes;

  // `panel` has the next tile's `slots`.
  Ahead(const NmGemmArgs& a, int64_t panel, const Slots& slots, const float* next_x,
        int64_t x_count)
      : values(nm_unit_values(a, panel, slots.unit) + slots.begin * kNmPanel * a.bits / 8),
        value_bytes((slots.end - slots.begin) * kNmPanel * a.bits / 8),
        x(reinterpret_cast<const uint8_t*>(next_x)),
        x_bytes(x_count * int64_t(sizeof(float))) {
    __builtin_prefetch(nm_unit_index(a, panel, slots.unit));
    __builtin_prefetch(nm_unit_index(a, panel, slots.unit) + 64);
  }
  // The share of outputs [lane, lane + count).
  void fetch_share(int64_t lane, int64_t count) const {
    const auto first = [=](int64_t bytes) { return bytes * lane / kNmPanel; };
    const auto end = [=](int64_t bytes) { return bytes * (lane + count) / kNmPanel; };
    for (int64_t at = first(value_bytes); at < end(value_bytes); at += 64) {
      __builtin_prefetch(values + at);
    }
    // Into L2 only: L1 is full of this step's x.
    for (int64_t at = first(x_bytes); at < end(x_bytes); at += 64) {
      __builtin_prefetch(x + at, 0, 2);
    }
  }
};

// The 16 outputs of a tile.
OW_INLINE void multiply_tile(const float* x, const Tile& tile, Slots slots, bool shared,
                             const Ahead& ahead, float* sums, int64_t stride) {
  // Of few vectors, several outputs at a time: an FMA waits 4 cycles for the one before it.
  constexpr MultiplyFn kApart[] = {multiply_outputs<8, 1, false>, multiply_outputs<4, 2, false>,
                                   multiply_outputs<4, 3, false>, multiply_outputs<2, 4, false>,
                                   multiply_outputs<1, 5, false>, multiply_outputs<1, 6, false>,
                                   multiply_outputs<1, 7, false>, multiply_outputs<1, 8, false>};
  constexpr int64_t kApartRows[] = {8, 4, 4, 2, 1, 1, 1, 1};
  constexpr MultiplyFn kSharing[] = {
      multiply_outputs<kShared, 1, true>, multiply_outputs<kShared, 2, true>,
      multiply_outputs<kShared, 3, true>, multiply_outputs<kShared, 4, true>};
  const int64_t vectors = stride / kLanes;
  if (!shared) {
    const int64_t rows = kApartRows[vectors - 1];
    for (int64_t lane = 0; lane < kNmPanel; lane += rows) {
      if (lane % kShared == 0) ahead.fetch_share(lane, rows > kShared ? rows : kShared);
      kApart[vectors - 1](x, tile, slots, lane, sums + lane * stride, stride);
    }
    return;
  }
  for (int64_t v = 0; v < vectors; v += 4) {
    const MultiplyFn multiply = kSharing[min_of(4, vectors - v) - 1];
    for (int64_t lane = 0; lane < kNmPanel; lane += kShared) {
      if (v == 0) ahead.fetch_share(lane, kShared);
      multiply(x + v * kLanes, tile, slots, lane, sums + lane * stride + v * kLanes, stride);
    }
  }
}

// Slots multiplied at a time: as many of a unit as the columns they span are few.
OW_INLINE int64_t slots_at_a_time(const NmGemmArgs& a) {
  int64_t slots = kNmUnit;
  while (slots > 1 && slots * a.block > kColumns * a.kept) slots /= 2;
  return slots;
}

void multiply_panels(const NmGemmArgs& a, int64_t begin, int64_t end) {
  alignas(64) float sums[kOutputs * kPanelVectors * kLanes];
  Tile tile;
  const int64_t all = nm_slots(a.k, a.kept, a.block);
  const int64_t step = slots_at_a_time(a);
  const DecodeFn decode = decoder_of<true>(a);
  for (int64_t i = 0; i < token_panels(a); ++i) {
    const Tokens tokens = token_panel(a, i);
    const int64_t stride = tokens.stride();
    const float* x = laid_panel(a, tokens);
    for (int64_t first = begin; first < end; first += kOutputPanels) {
      const int64_t panels = min_of(kOutputPanels, end - first);
      memset(sums, 0, size_t(panels * kNmPanel * stride) * sizeof(float));
      for (int64_t slot = 0; slot < all; slot += step) {
        const int64_t unit = slot / kNmUnit;
        const int64_t s = slot % kNmUnit;
        const Slots slots{unit, s, min_of(s + step, all - unit * kNmUnit)};
        const float* next_x = x + (slot + step) / a.kept * a.block * stride;
        const int64_t x_share = step * a.block / a.kept * stride / panels;
        for (int64_t p = 0; p < panels; ++p) {
          decode(a, first + p, slots, uint32_t(stride), &tile);
          const Ahead ahead(a, p + 1 < panels ? first + p + 1 : first, slots, next_x + x_share * p,
                            x_share);
          multiply_tile(x, tile, slots, a.vector > 1, ahead, sums + p * kNmPanel * stride, stride);
        }
      }
      for (int64_t p = 0; p < panels; ++p) {
        finish_tile(a, first + p, tokens.begin * kLanes, stride, sums + p * kNmPanel * stride);
      }
    }
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
