// Gradients of block attention in terms of simd/vec.h and of an Engine, as the forward pass; each
// block_attention_backward_<tier>.cpp compiles it. Of the engine it also takes
//
//   pack_panels         64 rows to panels of 64 dimensions: [panels, 64 / kPair, 64, kPair]
//   store_rows          weights of keys j and j + 1, kLanes queries, to rows of keys: [32, 64]
//
// A tile of queries meets the keys it read, some units at a time. Scores and grad_p are keys by
// queries, as in the forward pass; with weights p and ds in place of them
//
//   grad_q^T [d, 64]   += K^T [d, keys]    * ds^T [keys, 64]        once for all units
//   grad_k [32 keys, d] += ds^T [32 keys, 64] * Q [64, d]           for each unit
//   grad_v [32 keys, dv] += p^T [32 keys, 64] * grad_o [64, dv]
//
// where rows of 64 lanes are what products take on their right side: Q and grad_o are cut into
// panels of 64 dimensions, and so are the sums of grad_k and grad_v. Where elements are bf16, ds is
// written twice: as a left side, and in pairs of keys.
#pragma once

#include "kernels/block_attention/block_attention_body.h"

namespace ow::OW_TARGET {
namespace {

// Units whose ds is in memory at a time.
constexpr int64_t kBackwardUnits = 4;
constexpr int64_t kUnitLanes = kUnitKeys * kQueryTile;

// One unit's K [32, d], K^T [d_rows, 32] and V [32, dv].
template <class E>
struct BackwardLayout {
  int64_t d, dv, d_rows;  // padded

  explicit BackwardLayout(const BlockAttentionArgs& a)
      : d(round_up(a.d, E::kDepth)), dv(round_up(a.dv, E::kDepth)), d_rows(round_up(a.d, 16)) {}

  int64_t transposed() const { return kUnitKeys * d; }
  int64_t values() const { return kUnitKeys * (d + d_rows); }
  int64_t elements() const { return kUnitKeys * (d + d_rows + dv); }
};

template <class E>
void pack_backward_unit(const BlockAttentionArgs& a, const void* const* keys,
                        const void* const* values, int64_t count, typename E::Element* out) {
  const BackwardLayout<E> layout(a);
  for (int64_t j = 0; j < kUnitKeys; ++j) {
    typename E::Element* key = out + j * layout.d;
    typename E::Element* value = out + layout.values() + j * layout.dv;
    if (j < count) {
      E::copy_row(keys[j], a.type, a.d, layout.d, key);
      E::copy_row(values[j], a.type, a.dv, layout.dv, value);
    } else {
      memset(key, 0, size_t(layout.d) * sizeof(*key));
      memset(value, 0, size_t(layout.dv) * sizeof(*value));
    }
  }
  E::transpose_values(keys, count, a.type, a.d, layout.d_rows, out + layout.transposed());
}

template <class E>
int64_t backward_unit_bytes(const BlockAttentionArgs& a) {
  return round_up(BackwardLayout<E>(a).elements() * int64_t(sizeof(typename E::Element)), 64);
}

template <class E>
void pack_backward(const BlockAttentionArgs& a, int64_t begin, int64_t end) {
  pack_units(a, begin, end,
             [&](const void* const* keys, const void* const* values, int64_t count, uint8_t* out) {
               pack_backward_unit<E>(a, keys, values, count,
                                     reinterpret_cast<typename E::Element*>(out));
             });
}

// The memory of one thread. Where elements are floats, weights and ds take the place of the
// products they are made of.
template <class E>
struct BackwardMemory {
  using Element = typename E::Element;
  static constexpr bool kSharesProducts = sizeof(Element) == sizeof(float);

  Element *q, *grad_o;                // [d, 64] and [dv, 64]: transposed
  Element *q_panels, *grad_o_panels;  // [panels, 64 queries, 64 dimensions]
  float* grad_q;                      // [d_rows, 64]
  float *scores, *grad_p;             // [32, 64]
  Element *weights, *ds;              // [32, 64]
  Element* ds_pairs;                  // [units of a step, 32, 64]
  Element* gathered;                  // units of single keys
  float* singles;                     // sums of one of them
  int64_t bytes;

  BackwardMemory(const BlockAttentionArgs& a, uint8_t* base) {
    const BackwardLayout<E> layout(a);
    uint8_t* next = base;
    const auto take = [&]<class T>(T** piece, int64_t count) {
      *piece = reinterpret_cast<T*>(next);
      next += round_up(count * int64_t(sizeof(T)), 64);
    };
    take(&q, layout.d * kQueryTile);
    take(&grad_o, layout.dv * kQueryTile);
    take(&q_panels, panels_of(a.d) * kQueryTile * kQueryTile);
    take(&grad_o_panels, panels_of(a.dv) * kQueryTile * kQueryTile);
    take(&grad_q, layout.d_rows * kQueryTile);
    take(&scores, kUnitLanes);
    take(&grad_p, kSharesProducts ? 0 : kUnitLanes);
    take(&weights, kSharesProducts ? 0 : kUnitLanes);
    take(&ds, kSharesProducts ? 0 : kUnitLanes);
    take(&ds_pairs, kBackwardUnits * kUnitLanes);
    const bool has_columns = a.columns.indptr != nullptr;
    take(&gathered, has_columns ? kBackwardUnits * layout.elements() : 0);
    take(&singles, has_columns ? sums_of_unit(a) : 0);
    bytes = next - base;
  }
};

// One tile of queries.
template <class E>
class Backward {
 public:
  using Element = typename E::Element;

  Backward(const BlockAttentionBackwardArgs& b, const QueryTile& tile, float* sums,
           uint8_t* scratch)
      : b_(b),
        a_(b.forward),
        tile_(tile),
        layout_(a_),
        memory_(a_, scratch),
        sight_(a_, tile),
        queries_(round_up(tile.count, 16)),
        kv_head_(tile.head / (a_.heads / a_.kv_heads)),
        sums_(sums) {
    const float scale = a_.scale < 0.0f ? -a_.scale : a_.scale;
    // Not 0: masked scores are -inf, and must stay it.
    scale_ = scale * kLog2E > 0x1p-100f ? scale * kLog2E : 0x1p-100f;
  }

  void run() {
    pack_operands();
    for (int64_t i = 0; i < queries_; ++i) read_row(i);
    memset(memory_.grad_q, 0, size_t(layout_.d_rows * kQueryTile) * sizeof(float));
    Walk walk(a_, tile_, sight_);
    int64_t count = 0;
    for (Unit unit; walk.next(&unit);) {
      operands_[count] = operands_of(unit, count);
      weigh_unit(unit, count);
      add_keys(unit, count);
      if (++count < kBackwardUnits) continue;
      add_queries(count);
      count = 0;
    }
    add_queries(count);
    write_queries();
  }

 private:
  const void* query_at(int64_t i) const {
    return row_at(a_.q, a_.type, tile_.sequence->q, a_.q_strides, tile_.first + i, tile_.head);
  }
  // Rows of o, lse and their gradients.
  int64_t result_row(int64_t i) const {
    return (tile_.sequence->row + tile_.first + i) * a_.heads + tile_.head;
  }
  const void* grad_o_at(int64_t i) const {
    return static_cast<const uint8_t*>(b_.grad_o) + result_row(i) * a_.dv * float_size(a_.type);
  }

  void pack_operands() {
    const void* rows[kQueryTile];
    for (int64_t i = 0; i < tile_.count; ++i) rows[i] = query_at(i);
    pack_side(rows, a_.d, layout_.d, a_.scale < 0.0f, memory_.q, memory_.q_panels);
    for (int64_t i = 0; i < tile_.count; ++i) rows[i] = grad_o_at(i);
    pack_side(rows, a_.dv, layout_.dv, false, memory_.grad_o, memory_.grad_o_panels);
  }

  // Rows of d, transposed (their sign turned if `negative`), and in panels.
  void pack_side(const void* const* rows, int64_t d, int64_t padded, bool negative,
                 Element* transposed, Element* panels) {
    for (int64_t i = 0; i < queries_; i += kLanes) {
      E::pack_queries(rows + i, min_of(tile_.count - i, kLanes), a_.type, d, padded, negative,
                      transposed + i * E::kPair);
    }
    memset(panels, 0, size_t(panels_of(d) * kQueryTile * kQueryTile) * sizeof(*panels));
    E::pack_panels(rows, tile_.count, a_.type, d, panels);
  }

  // lse in powers of two, and delta; a row without keys has weights of 0.
  void read_row(int64_t i) {
    lse_[i] = __builtin_inff();
    delta_[i] = 0.0f;
    if (i >= tile_.count) return;
    const float lse = a_.lse[result_row(i)];
    if (lse != kMinusInfinity) lse_[i] = lse * kLog2E;
    by_type(a_.type, a_.o, [&]<class T>(const T* o) {
      o += result_row(i) * a_.dv;
      const T* grad = static_cast<const T*>(b_.grad_o) + result_row(i) * a_.dv;
      VecF total = set1(0.0f);
      for (int64_t c = 0; c < a_.dv; c += kLanes) {
        total = fma(load_n(o + c, a_.dv - c), load_n(grad + c, a_.dv - c), total);
      }
      delta_[i] = sum(total) - b_.grad_lse[result_row(i)];
    });
  }

  const Element* operands_of(const Unit& unit, int64_t u) {
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
    Element* out = memory_.gathered + u * layout_.elements();
    pack_backward_unit<E>(a_, keys, values, unit.end, out);
    return out;
  }

  Element* pairs_of(int64_t u) const { return memory_.ds_pairs + u * kUnitLanes; }
  // Of the unit at hand, p and ds as rows of keys.
  Element* weights() const {
    if constexpr (BackwardMemory<E>::kSharesProducts) return memory_.scores;
    return memory_.weights;
  }
  Element* ds(int64_t u) const {
    return BackwardMemory<E>::kSharesProducts ? pairs_of(u) : memory_.ds;
  }

  // Weights p and ds = scale * p * (grad_p - delta) of a unit.
  void weigh_unit(const Unit& unit, int64_t u) {
    float* scores = memory_.scores;
    float* grad_p =
        BackwardMemory<E>::kSharesProducts ? reinterpret_cast<float*>(pairs_of(u)) : memory_.grad_p;
    multiply(operands_[u], layout_.d, memory_.q, scores);
    if (!sight_.is_full(unit)) hide(sight_, unit, 1, scores);
    multiply(operands_[u] + layout_.values(), layout_.dv, memory_.grad_o, grad_p);
    const VecF scale = set1(scale_);
    for (int64_t i = 0; i < queries_; i += kLanes) {
      const VecF shift = sub(set1(0.0f), load(lse_ + i));
      const VecF delta = load(delta_ + i);
      for (int64_t j = 0; j < kUnitKeys; j += 2) {
        VecF p[2], product[2];
#pragma GCC unroll 2
        for (int64_t r = 0; r < 2; ++r) {
          const int64_t at = (j + r) * kQueryTile + i;
          p[r] = E::exp2(fma(load(scores + at), scale, shift));
          product[r] = mul(mul(p[r], sub(load(grad_p + at), delta)), set1(a_.scale));
        }
        E::store_rows(weights(), j, i, p[0], p[1]);
        E::store_rows(ds(u), j, i, product[0], product[1]);
        if constexpr (E::kPair > 1) {
          E::store_weights(pairs_of(u), j, i, product[0], product[1]);
        }
      }
    }
  }

  // c [32, 64] = a [32, depth] * b [depth, 64]
  void multiply(const Element* a, int64_t depth, const Element* b, float* c) const {
    Product<Element> product{};
    product.a[0] = a;
    product.segments = 1;
    product.rows = kUnitKeys;
    product.row_stride = product.depth = depth;
    product.b = b;
    product.c = c;
    product.queries = queries_;
    E::multiply(product);
  }

  void add_queries(int64_t count) {
    if (count == 0) return;
    Product<Element> product{};
    product.segments = count;
    for (int64_t u = 0; u < count; ++u) product.a[u] = operands_[u] + layout_.transposed();
    product.rows = layout_.d_rows;
    product.row_stride = product.depth = kUnitKeys;
    product.b = memory_.ds_pairs;
    product.c = memory_.grad_q;
    product.add = true;
    product.queries = queries_;
    E::multiply(product);
  }

  // sums [panels, 32, 64] += weights [32, queries] * panels [queries, 64 dimensions]
  void add_panels(const Element* weights, const Element* panels, int64_t d, float* sums) const {
    for (int64_t c = 0; c < d; c += kQueryTile) {
      Product<Element> product{};
      product.a[0] = weights;
      product.segments = 1;
      product.rows = kUnitKeys;
      product.row_stride = kQueryTile;
      product.depth = queries_;
      product.b = panels + c * kQueryTile;
      product.c = sums + c * kUnitKeys;
      product.add = true;
      product.queries = round_up(min_of(d - c, kQueryTile), 16);
      E::multiply(product);
    }
  }

  void add_keys(const Unit& unit, int64_t u) {
    float* sums = memory_.singles;
    if (unit.single) {
      memset(sums, 0, size_t(sums_of_unit(a_)) * sizeof(float));
    } else {
      sums = sums_ + unit.key / kUnitKeys * sums_of_unit(a_);
    }
    add_panels(ds(u), memory_.q_panels, a_.d, sums);
    add_panels(weights(), memory_.grad_o_panels, a_.dv, sums + panels_of(a_.d) * kUnitLanes);
    if (!unit.single) return;
    for (int64_t j = 0; j < unit.end; ++j) {
      const int64_t key = unit.columns[j];
      float* to = sums_ + key / kUnitKeys * sums_of_unit(a_) + key % kUnitKeys * kQueryTile;
      const float* from = sums + j * kQueryTile;
      for (int64_t c = 0; c < sums_of_unit(a_); c += kUnitLanes) {
        for (int64_t l = 0; l < kQueryTile; l += kLanes) {
          store(to + c + l, add(load(to + c + l), load(from + c + l)));
        }
      }
    }
  }

  template <class T>
  void write_rows(T* out) const {
    for (int64_t i = 0; i < tile_.count; i += kLanes) {
      for (int64_t c = 0; c < a_.d; c += kLanes) {
        VecF rows[kLanes];
        for (int64_t r = 0; r < kLanes; ++r)
          rows[r] = load(memory_.grad_q + (c + r) * kQueryTile + i);
        transpose(rows);
        for (int64_t r = 0; r < min_of(kLanes, tile_.count - i); ++r) {
          store_n(out + result_row(i + r) * a_.d + c, rows[r], a_.d - c);
        }
      }
    }
  }

  void write_queries() const {
    switch (a_.type) {
      case FloatType::f32: return write_rows(static_cast<float*>(b_.grad_q));
      case FloatType::bf16: return write_rows(static_cast<bf16*>(b_.grad_q));
      case FloatType::f16: return write_rows(static_cast<f16*>(b_.grad_q));
    }
  }

  const BlockAttentionBackwardArgs& b_;
  const BlockAttentionArgs& a_;
  const QueryTile& tile_;
  const BackwardLayout<E> layout_;
  const BackwardMemory<E> memory_;
  const Sight sight_;
  const int64_t queries_, kv_head_;
  float* const sums_;  // of the sequence and key head: [units, sums_of_unit]
  float scale_;        // of scores, to powers of two
  const Element* operands_[kBackwardUnits];
  alignas(64) float lse_[kQueryTile];
  alignas(64) float delta_[kQueryTile];
};

template <class E>
int64_t backward_scratch_bytes(const BlockAttentionArgs& a) {
  return BackwardMemory<E>(a, nullptr).bytes;
}

template <class E>
void backward_tile(const BlockAttentionBackwardArgs& args, const QueryTile& tile, float* sums,
                   uint8_t* scratch) {
  Backward<E>(args, tile, sums, scratch).run();
}

template <class E>
constexpr BlockAttentionBackwardKernels backward_kernels_of() {
  return {backward_unit_bytes<E>, backward_scratch_bytes<E>, pack_backward<E>, backward_tile<E>};
}

}  // namespace
}  // namespace ow::OW_TARGET
