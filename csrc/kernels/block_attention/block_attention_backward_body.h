// Gradients of block attention in terms of simd/vec.h and of the products of FloatEngine; each
// block_attention_backward_<tier>.cpp compiles it once.
//
// A tile of queries meets the keys it read, some units at a time. Scores and grad_p are keys by
// queries, as in the forward pass; with weights p and ds in place of them
//
//   grad_q^T [d, 64]   += K^T [d, keys]    * ds^T [keys, 64]        once for all units
//   grad_k [32 keys, d] += ds^T [32 keys, 64] * Q [64, d]           for each unit
//   grad_v [32 keys, dv] += p^T [32 keys, 64] * grad_o [64, dv]
//
// where rows of 64 lanes are what products take on their right side: Q and grad_o are cut into
// panels of 64 dimensions, and so are the sums of grad_k and grad_v.
#pragma once

#include "kernels/block_attention/block_attention_float_body.h"

namespace ow::OW_TARGET {
namespace {

// Units whose products of keys by queries are in memory at a time: 2 x 32 KiB.
constexpr int64_t kBackwardUnits = 4;
constexpr int64_t kUnitLanes = kUnitKeys * kQueryTile;

// One unit's K [32, d], K^T [d, 32] and V [32, dv].
struct BackwardLayout {
  int64_t d, dv, d_rows;  // d_rows: rows of K^T

  explicit BackwardLayout(const BlockAttentionArgs& a)
      : d(a.d), dv(a.dv), d_rows(round_up(a.d, 16)) {}

  int64_t transposed() const { return kUnitKeys * d; }
  int64_t values() const { return kUnitKeys * (d + d_rows); }
  int64_t elements() const { return kUnitKeys * (d + d_rows + dv); }
};

void pack_backward_unit(const BlockAttentionArgs& a, const void* const* keys,
                        const void* const* values, int64_t count, float* out) {
  const BackwardLayout layout(a);
  for (int64_t j = 0; j < kUnitKeys; ++j) {
    float* key = out + j * a.d;
    float* value = out + layout.values() + j * a.dv;
    if (j < count) {
      FloatEngine::copy_row(keys[j], a.type, a.d, a.d, key);
      FloatEngine::copy_row(values[j], a.type, a.dv, a.dv, value);
    } else {
      memset(key, 0, size_t(a.d) * sizeof(float));
      memset(value, 0, size_t(a.dv) * sizeof(float));
    }
  }
  FloatEngine::transpose_values(keys, count, a.type, a.d, layout.d_rows, out + layout.transposed());
}

int64_t backward_unit_bytes(const BlockAttentionArgs& a) {
  return round_up(BackwardLayout(a).elements() * int64_t(sizeof(float)), 64);
}

void pack_backward(const BlockAttentionArgs& a, int64_t begin, int64_t end) {
  int64_t at = 0;
  for (int64_t s = 0; s < a.sequence_count; ++s) {
    const AttentionSequence& sequence = a.sequences[s];
    const int64_t units = div_up(sequence.keys, kUnitKeys);
    for (int64_t i = 0; i < units * a.kv_heads; ++i, ++at) {
      if (at < begin || at >= end) continue;
      const int64_t key = i % units * kUnitKeys;
      const int64_t count = min_of(sequence.keys - key, kUnitKeys);
      const void* keys[kUnitKeys];
      const void* values[kUnitKeys];
      for (int64_t j = 0; j < count; ++j) {
        keys[j] = row_at(a.k, a.type, sequence.k, a.k_strides, key + j, i / units);
        values[j] = row_at(a.v, a.type, sequence.v, a.v_strides, key + j, i / units);
      }
      pack_backward_unit(a, keys, values, count,
                         reinterpret_cast<float*>(a.packed + at * a.packed_unit_bytes));
    }
  }
}

// The memory of one thread, in floats.
struct BackwardMemory {
  float *q, *grad_o;                // [d, 64] and [dv, 64]: transposed
  float *q_panels, *grad_o_panels;  // [panels, 64 queries, 64 dimensions]
  float* grad_q;                    // [d_rows, 64]
  float *weights, *ds;              // [units of a step, 32, 64]
  float* gathered;                  // units of single keys
  float* singles;                   // sums of one of them
  int64_t bytes;

  BackwardMemory(const BlockAttentionArgs& a, uint8_t* base) {
    const BackwardLayout layout(a);
    float* next = reinterpret_cast<float*>(base);
    const auto take = [&](int64_t count) {
      float* piece = next;
      next += round_up(count, 16);
      return piece;
    };
    q = take(a.d * kQueryTile);
    grad_o = take(a.dv * kQueryTile);
    q_panels = take(panels_of(a.d) * kQueryTile * kQueryTile);
    grad_o_panels = take(panels_of(a.dv) * kQueryTile * kQueryTile);
    grad_q = take(layout.d_rows * kQueryTile);
    weights = take(kBackwardUnits * kUnitLanes);
    ds = take(kBackwardUnits * kUnitLanes);
    const bool has_columns = a.columns.indptr != nullptr;
    gathered = take(has_columns ? kBackwardUnits * layout.elements() : 0);
    singles = take(has_columns ? sums_of_unit(a) : 0);
    bytes = int64_t(reinterpret_cast<uint8_t*>(next) - base);
  }
};

// One tile of queries.
class Backward {
 public:
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
    for (;;) {
      int64_t count = 0;
      while (count < kBackwardUnits && walk.next(units_ + count)) ++count;
      if (count == 0) break;
      for (int64_t u = 0; u < count; ++u) weigh_unit(u);
      add_queries(count);
      for (int64_t u = 0; u < count; ++u) add_keys(u);
    }
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
    pack_side(rows, a_.d, a_.scale < 0.0f, memory_.q, memory_.q_panels);
    for (int64_t i = 0; i < tile_.count; ++i) rows[i] = grad_o_at(i);
    pack_side(rows, a_.dv, false, memory_.grad_o, memory_.grad_o_panels);
  }

  // Rows of d, transposed (their sign turned if `negative`), and in panels.
  void pack_side(const void* const* rows, int64_t d, bool negative, float* transposed,
                 float* panels) {
    for (int64_t i = 0; i < queries_; i += kLanes) {
      FloatEngine::pack_queries(rows + i, min_of(tile_.count - i, kLanes), a_.type, d, d, negative,
                                transposed + i);
    }
    memset(panels, 0, size_t(panels_of(d) * kQueryTile * kQueryTile) * sizeof(float));
    for (int64_t i = 0; i < tile_.count; ++i) {
      for (int64_t c = 0; c < d; c += kQueryTile) {
        const uint8_t* from = static_cast<const uint8_t*>(rows[i]) + c * float_size(a_.type);
        const int64_t width = min_of(d - c, kQueryTile);
        FloatEngine::copy_row(from, a_.type, width, width, panels + (c + i) * kQueryTile);
      }
    }
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

  const float* operands_of(const Unit& unit, int64_t u) {
    const AttentionSequence& sequence = *tile_.sequence;
    if (!unit.single) {
      const int64_t in_head = div_up(sequence.keys, kUnitKeys);
      const int64_t at = sequence.unit * a_.kv_heads + kv_head_ * in_head + unit.key / kUnitKeys;
      return reinterpret_cast<const float*>(a_.packed + at * a_.packed_unit_bytes);
    }
    const void* keys[kUnitKeys];
    const void* values[kUnitKeys];
    for (int64_t j = 0; j < unit.end; ++j) {
      keys[j] = row_at(a_.k, a_.type, sequence.k, a_.k_strides, unit.columns[j], kv_head_);
      values[j] = row_at(a_.v, a_.type, sequence.v, a_.v_strides, unit.columns[j], kv_head_);
    }
    float* out = memory_.gathered + u * layout_.elements();
    pack_backward_unit(a_, keys, values, unit.end, out);
    return out;
  }

  // Weights p and ds = scale * p * (grad_p - delta) of a unit.
  void weigh_unit(int64_t u) {
    const Unit& unit = units_[u];
    operands_[u] = operands_of(unit, u);
    float* weights = memory_.weights + u * kUnitLanes;
    float* ds = memory_.ds + u * kUnitLanes;
    multiply(operands_[u], kUnitKeys, a_.d, memory_.q, weights, false, queries_);
    if (!sight_.is_full(unit)) hide(sight_, unit, queries_, weights);
    multiply(operands_[u] + layout_.values(), kUnitKeys, a_.dv, memory_.grad_o, ds, false,
             queries_);
    for (int64_t i = 0; i < queries_; i += kLanes) {
      const VecF shift = sub(set1(0.0f), load(lse_ + i));
      const VecF delta = load(delta_ + i);
      for (int64_t j = 0; j < kUnitLanes; j += kQueryTile) {
        const VecF p = exp2_(fma(load(weights + j + i), set1(scale_), shift));
        const VecF grad = sub(load(ds + j + i), delta);
        store(weights + j + i, p);
        store(ds + j + i, mul(mul(p, grad), set1(a_.scale)));
      }
    }
  }

  // c [rows, 64] (+)= a [rows, depth] * b [depth, 64]
  static void multiply(const float* a, int64_t rows, int64_t depth, const float* b, float* c,
                       bool add, int64_t lanes) {
    Product<float> product{};
    product.a[0] = a;
    product.segments = 1;
    product.rows = rows;
    product.row_stride = product.depth = depth;
    product.b = b;
    product.c = c;
    product.add = add;
    product.queries = lanes;
    FloatEngine::multiply(product);
  }

  void add_queries(int64_t count) {
    Product<float> product{};
    product.segments = count;
    for (int64_t u = 0; u < count; ++u) product.a[u] = operands_[u] + layout_.transposed();
    product.rows = layout_.d_rows;
    product.row_stride = product.depth = kUnitKeys;
    product.b = memory_.ds;
    product.c = memory_.grad_q;
    product.add = true;
    product.queries = queries_;
    FloatEngine::multiply(product);
  }

  // sums [panels, 32, 64] += weights [32, queries] * panels [queries, 64 dimensions]
  void add_panels(const float* weights, const float* panels, int64_t d, float* sums) const {
    for (int64_t c = 0; c < d; c += kQueryTile) {
      Product<float> product{};
      product.a[0] = weights;
      product.segments = 1;
      product.rows = kUnitKeys;
      product.row_stride = kQueryTile;
      product.depth = queries_;
      product.b = panels + c * kQueryTile;
      product.c = sums + c * kUnitKeys;
      product.add = true;
      product.queries = round_up(min_of(d - c, kQueryTile), 16);
      FloatEngine::multiply(product);
    }
  }

  void add_keys(int64_t u) {
    const Unit& unit = units_[u];
    float* sums = memory_.singles;
    if (unit.single) {
      memset(sums, 0, size_t(sums_of_unit(a_)) * sizeof(float));
    } else {
      sums = sums_ + unit.key / kUnitKeys * sums_of_unit(a_);
    }
    add_panels(memory_.ds + u * kUnitLanes, memory_.q_panels, a_.d, sums);
    add_panels(memory_.weights + u * kUnitLanes, memory_.grad_o_panels, a_.dv,
               sums + panels_of(a_.d) * kUnitLanes);
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
  const BackwardLayout layout_;
  const BackwardMemory memory_;
  const Sight sight_;
  const int64_t queries_, kv_head_;
  float* const sums_;  // of the sequence and key head: [units, sums_of_unit]
  float scale_;        // of scores, to powers of two
  Unit units_[kBackwardUnits];
  const float* operands_[kBackwardUnits];
  alignas(64) float lse_[kQueryTile];
  alignas(64) float delta_[kQueryTile];
};

int64_t backward_scratch_bytes(const BlockAttentionArgs& a) {
  return BackwardMemory(a, nullptr).bytes;
}

void backward_tile(const BlockAttentionBackwardArgs& args, const QueryTile& tile, float* sums,
                   uint8_t* scratch) {
  Backward(args, tile, sums, scratch).run();
}

}  // namespace
}  // namespace ow::OW_TARGET
