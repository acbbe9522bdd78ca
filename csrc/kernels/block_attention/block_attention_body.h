// Block attention in terms of simd/vec.h and of an Engine, which each tier defines:
//
//   Element, kPair      what K, V^T, Q^T and weights are made of; kPair of them along the depth of
//   a
//                       product lie together in Q^T and in weights: [depth / kPair, 64, kPair]
//   kDepth              depths are multiples of it
//   kTileUnits          units whose scores and weights are in memory at a time
//   pack_query          16 queries' rows to their lanes of Q^T
//   transpose_values    one unit's values to V^T
//   exp2                2^x for x <= kSlack, 0 at -inf
//   store_weights       of keys j and j + 1, kLanes queries
//   load_weights        the same, as floats
//   write_outputs       kLanes queries' lanes of o^T to their rows, times 1 / l
//   multiply            c [rows, 64] (+)= sum_s a_s [rows, depth] * b_s [depth, 64]
#pragma once

#include "kernels/block_attention/block_attention_layout_body.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// How far above m a score may be, in powers of two: weights stay far below what overflows, and m
// seldom moves.
constexpr float kSlack = 8.0f;
constexpr float kLowest = -3.40282347e38f;
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504f;
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

// Scores [keys of `unit`, 64] of what a query does not see become -inf.
OW_INLINE void hide(const Sight& sight, const Unit& unit, int64_t queries, float* scores) {
  for (int64_t j = 0; j < kUnitKeys; ++j, scores += kQueryTile) {
    Range seen{0, 0};
    if (j >= unit.begin && j < unit.end) seen = sight.queries(unit.position(j));
    for (int64_t i = 0; i < min_of(seen.begin, queries); ++i) scores[i] = kMinusInfinity;
    const int64_t behind = seen.end > seen.begin ? seen.end : 0;
    for (int64_t i = behind; i < queries; ++i) scores[i] = kMinusInfinity;
  }
}

// One tile of queries on its way through the keys.
template <class E>
class Attend {
 public:
  using Element = typename E::Element;

  Attend(const BlockAttentionArgs& a, QueryTile& tile, uint8_t* scratch)
      : a_(a),
        tile_(tile),
        layout_(a),
        memory_(a, scratch),
        sight_(a, tile),
        queries_(round_up(tile.count, 16)),
        kv_head_(tile.head / (a.heads / a.kv_heads)) {
    const float scale = a.scale < 0.0f ? -a.scale : a.scale;
    // Not 0: masked scores are -inf, and must stay it.
    scale_ = scale * kLog2E > 0x1p-100f ? scale * kLog2E : 0x1p-100f;
  }

  void run() {
    pack_queries();
    fetch_rows();
    for (int64_t i = 0; i < kQueryTile; ++i) m_[i] = kLowest;
    for (int64_t i = 0; i < kQueryTile; ++i) l_[i] = 0.0f;
    Walk walk(a_, tile_, sight_);
    const bool keep = tile_.scores != nullptr;
    int64_t tiles = 0;
    for (;; ++tiles) {
      const int64_t slot = keep ? tiles : 0;
      units_ = memory_.units + slot * E::kTileUnits;
      weights_ = memory_.weights + slot * Memory<E>::kTileKeys * kQueryTile;
      scores_ = Memory<E>::kSharesScores ? reinterpret_cast<float*>(weights_) : memory_.scores;
      count_ = 0;
      while (count_ < E::kTileUnits && walk.next(units_ + count_)) ++count_;
      if (count_ == 0) break;
      multiply_keys();
      first_ = tiles == 0;
      for (int64_t i = 0; i < queries_; i += kLanes) soften(i);
      if (keep) memcpy(memory_.maxima + slot * kQueryTile, m_, sizeof(m_));
      multiply_values();
      last_count_ = count_;
    }
    if (tiles == 0) memset(memory_.o, 0, size_t(layout_.dv * kQueryTile) * 4);
    finish();
    if (keep) sum_columns(tiles);
  }

 private:
  void pack_queries() {
    const void* rows[kQueryTile];
    for (int64_t i = 0; i < tile_.count; ++i) {
      rows[i] = row_at(a_.q, a_.type, tile_.sequence->q, a_.q_strides, tile_.first + i, tile_.head);
    }
    for (int64_t i = 0; i < queries_; i += kLanes) {
      E::pack_queries(rows + i, min_of(tile_.count - i, kLanes), a_.type, a_.d, layout_.d,
                      a_.scale < 0.0f, memory_.q + i * E::kPair);
    }
  }

  uint8_t* output_at(int64_t i) const {
    const int64_t row = tile_.sequence->row + tile_.first + i;
    return static_cast<uint8_t*>(a_.o) +
           (row * a_.heads + tile_.head) * a_.dv * float_size(a_.type);
  }

  // The output's rows, and the next tile's queries: 64 of each, some pages apart, are too few for
  // the processor to guess.
  void fetch_rows() const {
    const int64_t bytes = a_.dv * float_size(a_.type);
    for (int64_t i = 0; i < tile_.count; ++i) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(output_at(i) + at, 1, 2);
    }
    const int64_t next = tile_.first + tile_.count;
    const int64_t size = a_.d * float_size(a_.type);
    for (int64_t i = next; i < min_of(next + kQueryTile, tile_.sequence->queries); ++i) {
      const uint8_t* row = row_at(a_.q, a_.type, tile_.sequence->q, a_.q_strides, i, tile_.head);
      for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(row + at, 0, 2);
    }
  }

  // K, then V^T, of a unit.
  const Element* operands_of(int64_t u) {
    const Unit& unit = units_[u];
    const AttentionSequence& sequence = *tile_.sequence;
    if (!unit.single) {
      const int64_t in_head = div_up(sequence.keys, kUnitKeys);
      const int64_t at = sequence.unit * a_.kv_heads + kv_head_ * in_head + unit.key / kUnitKeys;
      return reinterpret_cast<const Element*>(a_.packed + at * a_.packed_unit_bytes);
    }
    const void* keys[kUnitKeys];
    const void* values[kUnitKeys];
    for (int64_t j = 0; j < unit.end; ++j) {
      keys[j] = row_at(a_.k, a_.type, sequence.k, a_.k_strides, unit.columns[j], kv_head_);
      values[j] = row_at(a_.v, a_.type, sequence.v, a_.v_strides, unit.columns[j], kv_head_);
    }
    Element* out = memory_.gathered + u * (layout_.key_elements() + layout_.value_elements());
    pack_unit<E>(a_, keys, values, unit.end, out);
    return out;
  }

  void multiply_keys() {
    Product<Element> product{};
    product.segments = 1;
    product.rows = kUnitKeys;
    product.row_stride = product.depth = layout_.d;
    product.b = memory_.q;
    product.queries = queries_;
    for (int64_t u = 0; u < count_; ++u) {
      operands_[u] = operands_of(u);
      product.a[0] = operands_[u];
      product.c = scores_ + u * kUnitKeys * kQueryTile;
      E::multiply(product);
      if (!sight_.is_full(units_[u])) hide(sight_, units_[u], queries_, product.c);
    }
  }

  // Scores of queries i .. i + kLanes - 1 to weights; m and l follow.
  void soften(int64_t i) {
    const int64_t keys = count_ * kUnitKeys;
    const float* scores = scores_ + i;
    VecF largest[2] = {set1(kMinusInfinity), set1(kMinusInfinity)};
    for (int64_t j = 0; j < keys; j += 2) {
      largest[0] = max_(largest[0], load(scores + j * kQueryTile));
      largest[1] = max_(largest[1], load(scores + (j + 1) * kQueryTile));
    }
    const VecF scale = set1(scale_);
    const VecF top = mul(max_(largest[0], largest[1]), scale);
    VecF m = load(m_ + i);
    VecF l = load(l_ + i);
    // The sign of a float is that of its bits as an integer.
    if (max_of_lanes(as_int(sub(top, add(m, set1(kSlack))))) > 0) {
      const VecF before = m;
      m = max_(m, top);
      const VecF factor = E::exp2(sub(before, m));
      l = mul(l, factor);
      for (int64_t c = first_ ? layout_.dv : 0; c < layout_.dv; ++c) {
        float* o = memory_.o + c * kQueryTile + i;
        store(o, mul(load(o), factor));
      }
      store(m_ + i, m);
    }
    const VecF shift = sub(set1(0.0f), m);
    VecF sums[2] = {l, set1(0.0f)};
    for (int64_t j = 0; j < keys; j += 2) {
      const VecF even = E::exp2(fma(load(scores + j * kQueryTile), scale, shift));
      const VecF odd = E::exp2(fma(load(scores + (j + 1) * kQueryTile), scale, shift));
      sums[0] = add(sums[0], even);
      sums[1] = add(sums[1], odd);
      E::store_weights(weights_, j, i, even, odd);
    }
    store(l_ + i, add(sums[0], sums[1]));
  }

  void multiply_values() {
    Product<Element> product{};
    product.segments = count_;
    for (int64_t u = 0; u < count_; ++u) product.a[u] = operands_[u] + layout_.key_elements();
    product.rows = layout_.dv;
    product.row_stride = product.depth = kUnitKeys;
    product.b = weights_;
    product.c = memory_.o;
    product.add = !first_;
    product.queries = queries_;
    E::multiply(product);
  }

  void finish() {
    for (int64_t i = 0; i < kQueryTile; ++i) {
      inverse_[i] = l_[i] == 0.0f ? 0.0f : 1.0f / l_[i];
    }
    memcpy(tile_.m, m_, sizeof(m_));
    memcpy(tile_.l, l_, sizeof(l_));
    for (int64_t i = 0; i < tile_.count; i += kLanes) {
      E::write_outputs(memory_.o + i, load(inverse_ + i), min_of(tile_.count - i, kLanes), a_.type,
                       a_.dv, output_at(i), a_.heads * a_.dv);
    }
  }

  // Adds up the weights that were kept, as they count now.
  void sum_columns(int64_t tiles) {
    const uint8_t* chosen = a_.score_rows + tile_.sequence->row + tile_.first;
    for (int64_t i = 0; i < kQueryTile; ++i) {
      if (i >= tile_.count || !chosen[i]) inverse_[i] = 0.0f;
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t count = t + 1 < tiles ? E::kTileUnits : last_count_;
      alignas(64) float factors[kQueryTile];
      const float* m = memory_.maxima + t * kQueryTile;
      for (int64_t i = 0; i < queries_; i += kLanes) {
        store(factors + i, mul(E::exp2(sub(load(m + i), load(m_ + i))), load(inverse_ + i)));
      }
      for (int64_t u = 0; u < count; ++u) {
        const int64_t unit = t * E::kTileUnits + u;
        sum_unit(memory_.units[unit], memory_.weights + unit * kUnitKeys * kQueryTile, factors);
      }
    }
  }

  void sum_unit(const Unit& unit, const Element* weights, const float* factors) {
    for (int64_t j = unit.begin / 2 * 2; j < unit.end; j += 2) {
      VecF sums[2] = {set1(0.0f), set1(0.0f)};
      for (int64_t i = 0; i < queries_; i += kLanes) {
        VecF even, odd;
        E::load_weights(weights, j, i, &even, &odd);
        sums[0] = fma(even, load(factors + i), sums[0]);
        sums[1] = fma(odd, load(factors + i), sums[1]);
      }
      if (j >= unit.begin) tile_.scores[unit.position(j)] += sum(sums[0]);
      if (j + 1 < unit.end) tile_.scores[unit.position(j + 1)] += sum(sums[1]);
    }
  }

  const BlockAttentionArgs& a_;
  QueryTile& tile_;
  const Layout<E> layout_;
  const Memory<E> memory_;
  const Sight sight_;
  const int64_t queries_, kv_head_;
  float scale_;  // of scores, to powers of two
  // Of the tile of keys at hand.
  Unit* units_ = nullptr;
  float* scores_ = nullptr;
  Element* weights_ = nullptr;
  int64_t count_ = 0, last_count_ = 0;
  bool first_ = true;
  const Element* operands_[kMaxTileUnits];
  alignas(64) float m_[kQueryTile];
  alignas(64) float l_[kQueryTile];
  alignas(64) float inverse_[kQueryTile];  // 1 / l
};

template <class E>
int64_t packed_unit_bytes(const BlockAttentionArgs& a) {
  return round_up(Layout<E>(a).unit_bytes(), 64);
}
template <class E>
int64_t scratch_bytes(const BlockAttentionArgs& a) {
  return Memory<E>(a, nullptr).bytes;
}
template <class E>
void attend(const BlockAttentionArgs& a, QueryTile& tile, uint8_t* scratch) {
  Attend<E>(a, tile, scratch).run();
}

template <class E>
constexpr BlockAttentionKernels kernels_of() {
  return {packed_unit_bytes<E>, scratch_bytes<E>, pack<E>, attend<E>};
}

}  // namespace
}  // namespace ow::OW_TARGET
