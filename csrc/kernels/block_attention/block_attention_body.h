// Block attention in terms of simd/vec.h and of an Engine, which each tier defines:
//
//   Element, kPair      what K, V^T, Q^T and weights are made of; in Q^T and in weights, kPair of
//                       them along the depth of a product lie together: [depth / kPair, 64, kPair]
//   kDepth              depths are multiples of it
//   kTileUnits          units whose weights are in memory at a time, and values added
//   pack_query          16 queries' rows to their lanes of Q^T
//   transpose_values    one unit's values to V^T
//   exp2                2^x for x <= kSlack, 0 at -inf
//   store_weights       of keys j and j + 1, kLanes queries
//   load_weights        the same, as floats
//   write_outputs       kLanes queries' lanes of o^T to their rows, times 1 / l
//   multiply            c [rows, 64] (+)= sum_s a_s [rows, depth] * b_s [depth, 64]
#pragma once

#include "kernels/block_attention/block_attention_layout_body.h"
#include "kernels/block_attention/block_attention_product_body.h"
#include "simd/vec.h"

namespace ow::OW_TARGET {
namespace {

// How far above m a score may be, in powers of two: weights stay far below what overflows, and m
// seldom moves.
constexpr float kSlack = 8.0f;
constexpr float kLowest = -3.40282347e38f;
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504f;

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
        kv_head_(tile.head / (a.heads / a.kv_heads)),
        keeps_(tile.scores != nullptr) {
    const float scale = a.scale < 0.0f ? -a.scale : a.scale;
    // Not 0: masked scores are -inf, and must stay it.
    scale_ = scale * kLog2E > 0x1p-100f ? scale * kLog2E : 0x1p-100f;
  }

  void run() {
    pack_queries();
    for (int64_t i = 0; i < kQueryTile; ++i) m_[i] = kLowest;
    for (int64_t i = 0; i < kQueryTile; ++i) l_[i] = 0.0f;
    Walk walk(a_, tile_, sight_);
    while (walk.next(memory_.units + end_)) {
      add_unit();
      if (end_ - begin_ == E::kTileUnits) multiply_values();
    }
    multiply_values();
    if (first_) memset(memory_.o, 0, size_t(layout_.dv * kQueryTile) * 4);
    finish();
    if (keeps_) sum_columns();
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

  // K, then V^T, of a unit.
  const Element* operands_of(const Unit& unit) {
    const AttentionSequence& sequence = *tile_.sequence;
    if (!unit.single) {
      return reinterpret_cast<const Element*>(packed_unit(a_, sequence, kv_head_, unit));
    }
    const void* keys[kUnitKeys];
    const void* values[kUnitKeys];
    for (int64_t j = 0; j < unit.end; ++j) {
      keys[j] = row_at(a_.k, a_.type, sequence.k, a_.k_strides, unit.columns[j], kv_head_);
      values[j] = row_at(a_.v, a_.type, sequence.v, a_.v_strides, unit.columns[j], kv_head_);
    }
    Element* out =
        memory_.gathered + gathered_ * (layout_.key_elements() + layout_.value_elements());
    gathered_ = (gathered_ + 1) % E::kTileUnits;
    pack_unit<E>(a_, keys, values, unit.end, out);
    return out;
  }

  Element* weights_of(int64_t u) const { return memory_.weights + u * kUnitKeys * kQueryTile; }

  // Scores and weights of unit number end_.
  void add_unit() {
    const Unit& unit = memory_.units[end_];
    const Element* operands = operands_of(unit);
    Product<Element> product{};
    product.segments = 1;
    product.a[0] = operands;
    product.rows = kUnitKeys;
    product.row_stride = product.depth = layout_.d;
    product.b = memory_.q;
    product.c =
        Memory<E>::kSharesScores ? reinterpret_cast<float*>(weights_of(end_)) : memory_.scores;
    product.queries = queries_;
    E::multiply(product);
    if (!sight_.is_full(unit)) hide(sight_, unit, queries_, product.c);
    if (find_largest(product.c)) {
      // The units before it were weighed by the m so far.
      multiply_values();
      raise();
    }
    for (int64_t i = 0; i < queries_; i += kLanes) soften(product.c, i);
    if (keeps_) memcpy(memory_.maxima + end_ * kQueryTile, m_, sizeof(m_));
    operands_[end_ - begin_] = operands;
    ++end_;
  }

  // The largest score of each query; whether m must follow one of them.
  bool find_largest(const float* scores) {
    VecI excess = set1(int32_t(0));
    for (int64_t i = 0; i < queries_; i += kLanes) {
      VecF largest[4];
      for (int64_t j = 0; j < 4; ++j) largest[j] = load(scores + j * kQueryTile + i);
      for (int64_t j = 4; j < kUnitKeys; j += 4) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; ++r) {
          largest[r] = max_(largest[r], load(scores + (j + r) * kQueryTile + i));
        }
      }
      const VecF top = max_(max_(largest[0], largest[1]), max_(largest[2], largest[3]));
      const VecF scaled = mul(top, set1(scale_));
      store(largest_ + i, scaled);
      // The sign of a float is that of its bits as an integer.
      excess = max_(excess, as_int(sub(scaled, add(load(m_ + i), set1(kSlack)))));
    }
    return max_of_lanes(excess) > 0;
  }

  // m follows the largest scores; l and the output, m. Where it stays the factor must be 1, which
  // that of the engine's exponential is not.
  void raise() {
    for (int64_t i = 0; i < queries_; i += kLanes) {
      const VecF before = load(m_ + i);
      const VecF m = max_(before, load(largest_ + i));
      const VecF factor = exp2_(sub(before, m));
      store(m_ + i, m);
      store(l_ + i, mul(load(l_ + i), factor));
      for (int64_t c = first_ ? layout_.dv : 0; c < layout_.dv; ++c) {
        float* o = memory_.o + c * kQueryTile + i;
        store(o, mul(load(o), factor));
      }
    }
  }

  // Scores of queries i .. i + kLanes - 1 to weights, which l follows.
  void soften(const float* scores, int64_t i) {
    Element* weights = weights_of(end_);
    const VecF scale = set1(scale_);
    const VecF shift = sub(set1(0.0f), load(m_ + i));
    VecF sums[2] = {load(l_ + i), set1(0.0f)};
    for (int64_t j = 0; j < kUnitKeys; j += 2) {
      const VecF even = E::exp2(fma(load(scores + j * kQueryTile + i), scale, shift));
      const VecF odd = E::exp2(fma(load(scores + (j + 1) * kQueryTile + i), scale, shift));
      sums[0] = add(sums[0], even);
      sums[1] = add(sums[1], odd);
      E::store_weights(weights, j, i, even, odd);
    }
    store(l_ + i, add(sums[0], sums[1]));
  }

  // Adds the values of units begin_ .. end_ - 1.
  void multiply_values() {
    if (begin_ == end_) return;
    Product<Element> product{};
    product.segments = end_ - begin_;
    for (int64_t u = 0; u < product.segments; ++u) {
      product.a[u] = operands_[u] + layout_.key_elements();
    }
    product.rows = layout_.dv;
    product.row_stride = product.depth = kUnitKeys;
    product.b = weights_of(begin_);
    product.c = memory_.o;
    product.add = !first_;
    product.queries = queries_;
    E::multiply(product);
    first_ = false;
    if (!keeps_) end_ = 0;
    begin_ = end_;
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
  void sum_columns() {
    const uint8_t* chosen = a_.score_rows + tile_.sequence->row + tile_.first;
    for (int64_t i = 0; i < kQueryTile; ++i) {
      if (i >= tile_.count || !chosen[i]) inverse_[i] = 0.0f;
    }
    for (int64_t u = 0; u < end_; ++u) {
      alignas(64) float factors[kQueryTile];
      const float* m = memory_.maxima + u * kQueryTile;
      for (int64_t i = 0; i < queries_; i += kLanes) {
        store(factors + i, mul(exp2_(sub(load(m + i), load(m_ + i))), load(inverse_ + i)));
      }
      sum_unit(memory_.units[u], weights_of(u), factors);
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
  float scale_;       // of scores, to powers of two
  const bool keeps_;  // weights of all units, for column sums
  // Units whose values are to be added; where weights are not kept, places are used again.
  int64_t begin_ = 0, end_ = 0;
  const Element* operands_[kMaxTileUnits];
  int64_t gathered_ = 0;  // place of the next unit of single keys
  bool first_ = true;     // nothing is in the output yet
  alignas(64) float m_[kQueryTile];
  alignas(64) float l_[kQueryTile];
  alignas(64) float largest_[kQueryTile];  // score of the unit at hand
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
