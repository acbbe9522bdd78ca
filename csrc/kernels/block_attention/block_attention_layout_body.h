// Where K, V^T and a thread's memory are, and how keys and values are laid out.
#pragma once

#include "kernels/block_attention/block_attention_walk_body.h"

namespace ow::OW_TARGET {
namespace {

template <class Function>
OW_INLINE void by_type(FloatType type, const void* p, const Function& function) {
  switch (type) {
    case FloatType::f32: return function(static_cast<const float*>(p));
    case FloatType::bf16: return function(static_cast<const bf16*>(p));
    case FloatType::f16: return function(static_cast<const f16*>(p));
  }
}
template <class Function>
OW_INLINE void by_type(FloatType type, void* p, const Function& function) {
  switch (type) {
    case FloatType::f32: return function(static_cast<float*>(p));
    case FloatType::bf16: return function(static_cast<bf16*>(p));
    case FloatType::f16: return function(static_cast<f16*>(p));
  }
}

template <class E>
struct Layout {
  int64_t d, dv;  // padded

  explicit Layout(const BlockAttentionArgs& a)
      : d(round_up(a.d, E::kDepth)), dv(round_up(a.dv, 16)) {}

  int64_t key_elements() const { return kUnitKeys * d; }
  int64_t value_elements() const { return dv * kUnitKeys; }
  int64_t unit_bytes() const {
    return (key_elements() + value_elements()) * int64_t(sizeof(typename E::Element));
  }
};

// The memory of one thread. Scores and weights share theirs where elements are floats; where column
// sums are asked for, those of each unit have a place of their own.
template <class E>
struct Memory {
  using Element = typename E::Element;
  static constexpr bool kSharesScores = sizeof(Element) == sizeof(float);

  Element* q;         // Q^T
  float* o;           // o^T [dv, 64]
  float* scores;      // [keys of a unit, 64]
  Element* weights;   // of each unit: [32, 64]
  Unit* units;        // where column sums are asked for, and
  float* maxima;      // m of each: [64]
  Element* gathered;  // units of single keys, and those not laid out before
  int64_t bytes;

  Memory(const BlockAttentionArgs& a, uint8_t* base) {
    const Layout<E> layout(a);
    int64_t count = E::kTileUnits;
    if (a.score_rows != nullptr) {
      int64_t keys = 0;
      for (int64_t s = 0; s < a.sequence_count; ++s) {
        if (a.sequences[s].keys > keys) keys = a.sequences[s].keys;
      }
      // Runs of blocks, and the two ranges seen, may meet in a unit, which then is there twice; no
      // key is, and single keys fill their units.
      count = 2 * div_up(keys, kUnitKeys) + 4;
    }
    uint8_t* next = base;
    const auto take = [&](int64_t size) {
      uint8_t* piece = next;
      next += round_up(size, 64);
      return piece;
    };
    q = reinterpret_cast<Element*>(take(layout.d * kQueryTile * int64_t(sizeof(Element))));
    o = reinterpret_cast<float*>(take(layout.dv * kQueryTile * 4));
    weights =
        reinterpret_cast<Element*>(take(count * kUnitKeys * kQueryTile * int64_t(sizeof(Element))));
    scores = kSharesScores ? nullptr : reinterpret_cast<float*>(take(kUnitKeys * kQueryTile * 4));
    const int64_t kept = a.score_rows == nullptr ? 0 : count;
    units = reinterpret_cast<Unit*>(take(kept * int64_t(sizeof(Unit))));
    maxima = reinterpret_cast<float*>(take(kept * kQueryTile * 4));
    gathered = reinterpret_cast<Element*>(take(E::kTileUnits * layout.unit_bytes()));
    bytes = next - base;
  }
};

// Element (head, token) of keys or values of `sequence`, in bytes.
OW_INLINE const uint8_t* row_at(const void* base, FloatType type, int64_t sequence,
                                const TokenStrides& strides, int64_t token, int64_t head) {
  return static_cast<const uint8_t*>(base) +
         (sequence + token * strides.token + head * strides.head) * float_size(type);
}

// Keys of one unit, given where each one's row is; rows from `count` on are zeros.
template <class E>
void pack_keys(const BlockAttentionArgs& a, const void* const* keys, int64_t count,
               typename E::Element* out) {
  const int64_t d = Layout<E>(a).d;
  for (int64_t j = 0; j < kUnitKeys; ++j, out += d) {
    if (j < count) {
      E::copy_row(keys[j], a.type, a.d, d, out);
    } else {
      memset(out, 0, size_t(d) * sizeof(*out));
    }
  }
}

// Values, alike.
template <class E>
void pack_values(const BlockAttentionArgs& a, const void* const* values, int64_t count,
                 typename E::Element* out) {
  E::transpose_values(values, count, a.type, a.dv, Layout<E>(a).dv, out);
}

// Calls pack(rows of keys, rows of values, count, where to) for units [begin, end).
template <class Pack>
void pack_units(const BlockAttentionArgs& a, int64_t begin, int64_t end, const Pack& pack) {
  int64_t at = 0;
  for (int64_t s = 0; s < a.sequence_count; ++s) {
    const AttentionSequence& sequence = a.sequences[s];
    const int64_t units = div_up(sequence.keys, kUnitKeys);
    for (int64_t i = 0; i < units * (a.kv_end - a.kv_begin); ++i, ++at) {
      if (at < begin || at >= end) continue;
      const int64_t head = a.kv_begin + i / units;
      const int64_t key = i % units * kUnitKeys;
      const int64_t count = min_of(sequence.keys - key, kUnitKeys);
      const void* keys[kUnitKeys];
      const void* values[kUnitKeys];
      for (int64_t j = 0; j < count; ++j) {
        keys[j] = row_at(a.k, a.type, sequence.k, a.k_strides, key + j, head);
        values[j] = row_at(a.v, a.type, sequence.v, a.v_strides, key + j, head);
      }
      pack(keys, values, count, a.packed + at * a.packed_unit_bytes);
    }
  }
}

template <class E>
void pack(const BlockAttentionArgs& a, int64_t begin, int64_t end) {
  pack_units(a, begin, end,
             [&](const void* const* keys, const void* const* values, int64_t count, uint8_t* out) {
               auto* unit = reinterpret_cast<typename E::Element*>(out);
               pack_keys<E>(a, keys, count, unit);
               pack_values<E>(a, values, count, unit + Layout<E>(a).key_elements());
             });
}

// Where an aligned unit was laid out.
OW_INLINE const uint8_t* packed_unit(const BlockAttentionArgs& a, const AttentionSequence& sequence,
                                     int64_t kv_head, const Unit& unit) {
  const int64_t in_head = div_up(sequence.keys, kUnitKeys);
  const int64_t at = sequence.unit * (a.kv_end - a.kv_begin) + (kv_head - a.kv_begin) * in_head +
                     unit.key / kUnitKeys;
  return a.packed + at * a.packed_unit_bytes;
}

}  // namespace
}  // namespace ow::OW_TARGET
