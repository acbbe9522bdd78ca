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
//   write_outputs       kLanes lanes of o^T to their rows, times 1 / l
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

// Scores [keys of `unit`, 64] of what a query does not see, of any of the heads, become -inf.
OW_INLINE void hide(const Sight& sight, const Unit& unit, int64_t heads, float* scores) {
  const int64_t queries = sight.count;
  for (int64_t j = 0; j < kUnitKeys; ++j) {
    Range seen{0, 0};
    if (j >= unit.begin && j < unit.end) seen = sight.queries(unit.position(j));
    const int64_t behind = seen.end > seen.begin ? seen.end : 0;
    for (int64_t h = 0; h < heads; ++h) {
      float* row = scores + j * kQueryTile + h * queries;
      for (int64_t i = 0; i < min_of(seen.begin, queries); ++i) row[i] = kMinusInfinity;
      for (int64_t i = behind; i < queries; ++i) row[i] = kMinusInfinity;
    }
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
        rows_(tile.heads * tile.count),
        lanes_(round_up(rows_, 16)),
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
    Unit unit{}, next{};
    for (bool more = walk.next(&unit); more; unit = next) {
      more = walk.next(&next);
      next_.count = 0;
      if (more && (next.single || a_.packed == nullptr)) find_rows(next, &next_);
      add_unit(unit);
      if (end_ - begin_ == E::kTileUnits) multiply_values();
    }
    multiply_values();
    if (first_) memset(memory_.o, 0, size_t(layout_.dv * kQueryTile) * 4);
    finish();
    if (keeps_) sum_columns();
  }

 private:
  struct Operands {
    const Element* keys;
    int64_t key_stride;
    const Element* values;
  };
  struct Rows {
    int64_t count = 0;
    const void* keys[kUnitKeys];
    const void* values[kUnitKeys];
  };

  // Calls visit(lane, query, head) for every row.
  template <class Visit>
  void each_row(const Visit& visit) const {
    int64_t lane = 0;
    for (int64_t head = tile_.head; head < tile_.head + tile_.heads; ++head) {
      for (int64_t i = 0; i < tile_.count; ++i) visit(lane++, tile_.first + i, head);
    }
  }

  void pack_queries() {
    const void* rows[kQueryTile];
    each_row([&](int64_t lane, int64_t query, int64_t head) {
      rows[lane] = row_at(a_.q, a_.type, tile_.sequence->q, a_.q_strides, query, head);
    });
    for (int64_t i = 0; i < lanes_; i += kLanes) {
      E::pack_queries(rows + i, min_of(rows_ - i, kLanes), a_.type, a_.d, layout_.d,
                      a_.scale < 0.0f, memory_.q + i * E::kPair);
    }
  }

  // Rows of K and V of a unit.
  void find_rows(const Unit& unit, Rows* rows) const {
    const AttentionSequence& sequence = *tile_.sequence;
    rows->count = unit.single ? unit.end : min_of(sequence.keys - unit.key, kUnitKeys);
    for (int64_t j = 0; j < rows->count; ++j) {
      const int64_t key = unit.position(j);
      rows->keys[j] = row_at(a_.k, a_.type, sequence.k, a_.k_strides, key, kv_head_);
      rows->values[j] = row_at(a_.v, a_.type, sequence.v, a_.v_strides, key, kv_head_);
    }
  }

  // The rows of the next unit, while this one is computed with: laying out waits for memory.
  // Inlined, or gcc 12 finds that the call has no effect and drops it.
  __attribute__((always_inline)) void fetch(const void* const* rows, int64_t d) const {
    const int64_t bytes = d * float_size(a_.type);
    for (int64_t j = 0; j < next_.count; ++j) {
      for (int64_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(static_cast<const uint8_t*>(rows[j]) + i, 0, 2);
      }
    }
  }

  // K and V^T of a unit: as they were laid out for all tiles, or here; keys that need no change
  // stay where they are.
  Operands operands_of(const Unit& unit) {
    if (!unit.single && a_.packed != nullptr) {
      const Element* packed =
          reinterpret_cast<const Element*>(packed_unit(a_, *tile_.sequence, kv_head_, unit));
      return {packed, layout_.d, packed + layout_.key_elements()};
    }
    Rows rows;
    find_rows(unit, &rows);
    Element* keys =
        memory_.gathered + gathered_ * (layout_.key_elements() + layout_.value_elements());
    Element* values = keys + layout_.key_elements();
    gathered_ = (gathered_ + 1) % E::kTileUnits;
    pack_values<E>(a_, rows.values, rows.count, values);
    if (!unit.single && rows.count == kUnitKeys && a_.d == layout_.d &&
        float_size(a_.type) == int64_t(sizeof(Element))) {
      return {static_cast<const Element*>(rows.keys[0]), a_.k_strides.token, values};
    }
    pack_keys<E>(a_, rows.keys, rows.count, keys);
    return {keys, layout_.d, values};
  }

  Element* weights_of(int64_t u) const { return memory_.weights + u * kUnitKeys * kQueryTile; }

  // Scores and weights of a unit.
  void add_unit(const Unit& unit) {
    const Operands operands = operands_of(unit);
    Product<Element> product{};
    product.segments = 1;
    product.a[0] = operands.keys;
    product.rows = kUnitKeys;
    product.row_stride = operands.key_stride;
    product.depth = layout_.d;
    product.b = memory_.q;
    product.c =
        Memory<E>::kSharesScores ? reinterpret_cast<float*>(weights_of(end_)) : memory_.scores;
    product.queries = lanes_;
    fetch(next_.keys, a_.d);
    E::multiply(product);
    fetch(next_.values, a_.dv);
    if (!sight_.is_full(unit)) hide(sight_, unit, tile_.heads, product.c);
    if (find_largest(product.c)) {
      // The units before it were weighed by the m so far.
      multiply_values();
      raise();
    }
    for (int64_t i = 0; i < lanes_; i += kLanes) soften(product.c, i);
    if (keeps_) {
      memcpy(memory_.maxima + end_ * kQueryTile, m_, sizeof(m_));
      memory_.units[end_] = unit;
    }
    values_[end_ - begin_] = operands.values;
    ++end_;
  }

  // The largest score of each query; whether m must follow one of them.
  bool find_largest(const float* scores) {
    VecI excess = set1(int32_t(0));
    for (int64_t i = 0; i < lanes_; i += kLanes) {
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
    for (int64_t i = 0; i < lanes_; i += kLanes) {
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
      product.a[u] = values_[u];
    }
    product.rows = layout_.dv;
    product.row_stride = product.depth = kUnitKeys;
    product.b = weights_of(begin_);
    product.c = memory_.o;
    product.add = !first_;
    product.queries = lanes_;
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
    void* rows[kQueryTile];
    each_row([&](int64_t lane, int64_t query, int64_t head) {
      const int64_t row = (tile_.sequence->row + query) * a_.heads + head;
      rows[lane] = static_cast<uint8_t*>(a_.o) + row * a_.dv * float_size(a_.type);
    });
    for (int64_t i = 0; i < rows_; i += kLanes) {
      E::write_outputs(memory_.o + i, load(inverse_ + i), min_of(rows_ - i, kLanes), a_.type, a_.dv,
                       rows + i);
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
      for (int64_t i = 0; i < lanes_; i += kLanes) {
        store(factors + i, mul(exp2_(sub(load(m + i), load(m_ + i))), load(inverse_ + i)));
      }
      sum_unit(memory_.units[u], weights_of(u), factors);
    }
  }

  void sum_unit(const Unit& unit, const Element* weights, const float* factors) {
    for (int64_t j = unit.begin / 2 * 2; j < unit.end; j += 2) {
      VecF sums[2] = {set1(0.0f), set1(0.0f)};
      for (int64_t i = 0; i < lanes_; i += kLanes) {
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
  const int64_t rows_, lanes_;  // with a query, and computed
  const int64_t kv_head_;
  float scale_;       // of scores, to powers of two
  const bool keeps_;  // weights of all units, for column sums
  // Units whose values are to be added; where weights are not kept, places are used again.
  int64_t begin_ = 0, end_ = 0;
  const Element* values_[kMaxTileUnits];
  int64_t gathered_ = 0;  // place of the next unit laid out here
  Rows next_;             // of the unit that follows, where they will be laid out here
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
