// The attention kernels and their driver.
#include <math.h>

#include "kernels/decode_attention/decode_attention.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<const DecodeAttentionKernels*> kAttention[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_DECODE_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
};

constexpr int64_t kDims[] = {1, 3, 17, 64, 80};
constexpr int64_t kLengths[] = {1, 127, 128, 129, 300};  // around chunks of 128
constexpr int64_t kMaxRows = 9;                          // two blocks of four, and one

// The operands of one call, in plain memory.
struct Attention {
  DecodeAttentionArgs args{};
  Bytes q, keys, values;
  // The formula in double, and how far from it fp32 may be.
  std::vector<double> want, error, lse, lse_error;

  size_t y_bytes() const {
    return size_t(args.b * args.queries * args.heads * args.dv * float_size(args.type));
  }
};

// Layouts of a cache of n + 2 tokens of d numbers: a head's tokens together; a token's heads
// together; and a gap after each token.
CacheStrides cache_strides(const DecodeAttentionArgs& a, int64_t d, int layout) {
  const int64_t max_len = a.n + 2;
  switch (layout % 3) {
    case 0: return {a.kv_heads * max_len * d, max_len * d, d};
    case 1: return {max_len * a.kv_heads * d, d, a.kv_heads * d};
    default: return {a.kv_heads * max_len * (d + 3), max_len * (d + 3), d + 3};
  }
}

int64_t cache_at(const CacheStrides& strides, int64_t b, int64_t head, int64_t token) {
  return b * strides.b + head * strides.head + token * strides.token;
}

// Ends with the last key that may be read; between the keys there are NaNs.
Bytes fill_cache(const DecodeAttentionArgs& a, int64_t d, const CacheStrides& strides) {
  const int64_t size = float_size(a.type);
  const int64_t count = cache_at(strides, a.b - 1, a.kv_heads - 1, a.n - 1) + d;
  Bytes cache(size_t(count * size), Guarded::kPoison);
  for (int64_t b = 0; b < a.b; ++b) {
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      for (int64_t token = 0; token < a.n; ++token) {
        const Bytes row = floats(d, a.type, 1.0f);
        memcpy(cache.data() + cache_at(strides, b, head, token) * size, row.data(), row.size());
      }
    }
  }
  return cache;
}

// One query head of one query.
void add_formula(Attention* p, int64_t b, int64_t query, int64_t query_head) {
  const DecodeAttentionArgs& a = p->args;
  const int64_t head = query_head / group_of(a);
  const int64_t from = ((b * a.queries + query) * a.heads + query_head) * a.d;
  std::vector<double> weights;
  double largest = -INFINITY;
  double worst = 0.0;
  for (int64_t j = 0; j < a.n - a.queries + query + 1; ++j) {
    const int64_t key = cache_at(a.key_strides, b, head, j);
    double score = 0.0;
    double size = 0.0;
    for (int64_t i = 0; i < a.d; ++i) {
      const double term = double(a.scale) * double(read(p->q.data(), a.type, from + i)) *
                          double(read(p->keys.data(), a.type, key + i));
      score += term;
      size += fabs(term);
    }
    weights.push_back(score);
    largest = fmax(largest, score);
    worst = fmax(worst, size);
  }
  double total = 0.0;
  for (double& weight : weights) total += weight = exp(weight - largest);
  // Of a weight: d + 3 roundings of its score; two differences of scores, each up to 2 * worst; two
  // exponentials of 3e-7, which is 6 roundings. Then one a key and one a chunk; twice, because the
  // sum of the weights is as far off; and the quotient.
  const double roundings =
      2.0 * (double(a.d + 3 + 4) * worst + 12.0 + double(a.n + spans_of(a))) + 1.0;
  // Of lse: the roundings of a weight, of their sum, and its own.
  p->lse.push_back(largest + log(total));
  p->lse_error.push_back((roundings + fabs(p->lse.back()) + 2.0) * 0x1p-24);
  for (int64_t i = 0; i < a.dv; ++i) {
    double sum = 0.0;
    double size = 0.0;
    for (size_t j = 0; j < weights.size(); ++j) {
      const int64_t at = cache_at(a.value_strides, b, head, int64_t(j)) + i;
      const double value = double(read(p->values.data(), a.type, at));
      sum += weights[j] / total * value;
      size += weights[j] / total * fabs(value);
    }
    p->want.push_back(sum);
    p->error.push_back(roundings * 0x1p-24 * size);
  }
}

// `variant` picks the type and the layouts of the caches.
Attention make_attention(int64_t b, int64_t queries, int64_t group, int64_t kv_heads, int64_t d,
                         int64_t n, int variant) {
  Attention p;
  DecodeAttentionArgs& a = p.args;
  a.b = b;
  a.queries = queries;
  a.heads = group * kv_heads;
  a.kv_heads = kv_heads;
  a.d = d;
  a.dv = variant % 4 == 3 ? d / 2 + 1 : d;
  a.n = n;
  a.type = kTypes[variant % 3];
  a.scale = 1.0f / sqrtf(float(d));
  a.key_strides = cache_strides(a, d, variant / 3);
  a.value_strides = cache_strides(a, a.dv, variant / 9 + 1);
  p.q = floats(b * queries * a.heads * d, a.type, 3.0f);
  p.keys = fill_cache(a, d, a.key_strides);
  p.values = fill_cache(a, a.dv, a.value_strides);
  return p;
}

void check_kernels(const KernelEntry<const DecodeAttentionKernels*>& entry, const Attention& p,
                   Guarded* memory) {
  running = entry.name;
  for (const Against side : kSides) {
    memory->restart(side);
    DecodeAttentionArgs a = p.args;
    a.q = memory->copy(p.q);
    a.keys = memory->copy(p.keys);
    a.values = memory->copy(p.values);
    a.states = memory->empty<float>(size_t(decode_attention_state_count(a)));
    a.y = memory->empty<uint8_t>(p.y_bytes());
    a.lse = memory->empty<float>(p.lse.size());
    // In two calls, the later units first: a call must keep to its own.
    const int64_t units = items_of(a) * spans_of(a);
    entry.fn->attend(a, units / 2, units);
    entry.fn->attend(a, 0, units / 2);
    entry.fn->merge(a, items_of(a) / 2, items_of(a));
    entry.fn->merge(a, 0, items_of(a) / 2);
    bool same = true;
    for (size_t i = 0; i < p.want.size(); ++i) {
      const double bound = p.error[i] + double(roundoff(a.type)) * (fabs(p.want[i]) + p.error[i]);
      same &= fabs(double(read(a.y, a.type, int64_t(i))) - p.want[i]) <= bound + 0x1p-25;
    }
    for (size_t i = 0; i < p.lse.size(); ++i) {
      same &= fabs(double(a.lse[i]) - p.lse[i]) <= p.lse_error[i];
    }
    CHECK(same, "%s: b %d, %d queries, heads %d of %d, d %d, n %d, type %d differs", entry.name,
          int(a.b), int(a.queries), int(a.heads), int(a.kv_heads), int(a.d), int(a.n), int(a.type));
    CHECK(memory->intact(), "%s: wrote outside of states or y", entry.name);
  }
}

void check_rows(int64_t queries, int64_t group, int* variant, Guarded* memory) {
  for (const int64_t d : kDims) {
    for (const int64_t n : kLengths) {
      if (queries > n) continue;
      ++*variant;
      const int64_t b = 1 + *variant % 2;
      const int64_t kv_heads = 1 + *variant / 2 % 2;
      Attention p = make_attention(b, queries, group, kv_heads, d, n, *variant);
      for (int64_t i = 0; i < b * queries * group * kv_heads; ++i) {
        const int64_t token = i / p.args.heads;
        add_formula(&p, token / queries, token % queries, i % p.args.heads);
      }
      for (const auto& entry : kAttention) {
        if (entry.isa <= detected_isa()) check_kernels(entry, p, memory);
      }
    }
  }
}

void check_driver() {
  // 8 chunks of 16 items: work for more tasks of `attend` than threads, and for three of `merge`.
  const Attention p = make_attention(4, 2, 8, 4, 80, 900, 0);
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    const auto run = [&](const Parallel& parallel) {
      DecodeAttentionArgs a = p.args;
      std::vector<float> states(size_t(decode_attention_state_count(a)));
      Bytes y(p.y_bytes(), Guarded::kPoison);
      a.q = p.q.data();
      a.keys = p.keys.data();
      a.values = p.values.data();
      a.states = states.data();
      a.y = y.data();
      decode_attention(a, Isa(tier), parallel);
      return y;
    };
    const Bytes whole = run(serial_parallel());
    for (const int64_t threads : {2, 3, 7}) {
      CHECK(run(reversed_parallel(threads)) == whole, "decode_attention: %s: depends on %d threads",
            isa_name(Isa(tier)), int(threads));
    }
  }
}

}  // namespace

void check_decode_attention(Guarded* memory) {
  int variant = 0;
  for (int64_t rows = 1; rows <= kMaxRows; ++rows) {
    for (int64_t queries = 1; queries <= rows; ++queries) {
      if (rows % queries == 0) check_rows(queries, rows / queries, &variant, memory);
    }
  }
  check_driver();
}

}  // namespace ow::testing
