// The gradients of block attention: kernels against the formula, and their driver.
#include "smoke_block_attention.h"

namespace ow::testing {
namespace {

const KernelEntry<const BlockAttentionBackwardKernels*> kGradients[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_BLOCK_ATTENTION_GRADIENTS(OW_ROW)
#undef OW_ROW
};

// A gradient in double, and the size of what is added up to it.
struct Sum {
  std::vector<double> value, size;

  explicit Sum(int64_t count) : value(size_t(count), 0.0), size(size_t(count), 0.0) {}
  void add(int64_t at, double factor, double factor_size, double x) {
    value[size_t(at)] += factor * x;
    size[size_t(at)] += factor_size * fabs(x);
  }
};

struct Gradients {
  Bytes o, grad_o;
  std::vector<float> lse, grad_lse;
  Sum q, k, v;
};

// Of head `head` of query i.
void add_gradients(const AttentionShape& s, const Attention& p, int64_t i, int64_t head,
                   Gradients* g) {
  const FloatType type = p.args.type;
  const int64_t row = i * s.heads + head;
  double total = 0.0;
  const std::vector<double> weights = weights_of(s, p, i, head, &total);
  std::vector<double> grad_o;
  const double grad_lse = double(g->grad_lse[size_t(row)]);
  double delta = -grad_lse;
  double delta_size = fabs(grad_lse);
  for (int64_t c = 0; c < s.dv; ++c) {
    grad_o.push_back(double(read(g->grad_o.data(), type, row * s.dv + c)));
    const double product = double(read(g->o.data(), type, row * s.dv + c)) * grad_o.back();
    delta += product;
    delta_size += fabs(product);
  }
  for (int64_t j = 0; j < s.keys; ++j) {
    if (weights[size_t(j)] == 0.0) continue;
    const int64_t key = j * s.kv_heads + head / (s.heads / s.kv_heads);
    double grad_p = -delta;
    double size = delta_size;
    for (int64_t c = 0; c < s.dv; ++c) {
      const double product = grad_o[size_t(c)] * double(read(p.v.data(), type, key * s.dv + c));
      grad_p += product;
      size += fabs(product);
      g->v.add(key * s.dv + c, weights[size_t(j)], weights[size_t(j)], grad_o[size_t(c)]);
    }
    const double scale = double(p.args.scale) * weights[size_t(j)];
    for (int64_t c = 0; c < s.d; ++c) {
      g->q.add(row * s.d + c, scale * grad_p, scale * size,
               double(read(p.k.data(), type, key * s.d + c)));
      g->k.add(key * s.d + c, scale * grad_p, scale * size,
               double(read(p.q.data(), type, row * s.d + c)));
    }
  }
}

Gradients make_gradients(const AttentionShape& s, const Attention& p) {
  const FloatType type = p.args.type;
  const int64_t rows = s.queries * s.heads;
  const int64_t keys = s.keys * s.kv_heads;
  Gradients g{{},
              floats(rows * s.dv, type, 1.0f),
              {},
              {},
              Sum(rows * s.d),
              Sum(keys * s.d),
              Sum(keys * s.dv)};
  for (const double value : p.o) append(&g.o, type, float(value));
  for (const double value : p.lse) g.lse.push_back(float(value));
  for (int64_t i = 0; i < rows; ++i) g.grad_lse.push_back(rng.uniform());
  for (int64_t i = 0; i < s.queries; ++i) {
    for (int64_t head = 0; head < s.heads; ++head) add_gradients(s, p, i, head, &g);
  }
  return g;
}

// Weights are off by the rounding of scores, of lse (up to 4 sqrt(d)) and of the exponential; the
// rest are sums of dv products, then of keys or of all queries of a group. Kernels of bf16 products
// round weights and ds to it, and have an exponential to match.
double relative_error(const AttentionShape& s, bool rounds) {
  const double largest = 4.0 * sqrt(double(s.d));
  const double sums = 0x1p-24 * (double(s.d + 8) * largest + 4.0 * largest + 32.0 +
                                 double(s.dv + s.keys + s.queries * (s.heads / s.kv_heads)));
  return sums + (rounds ? double(roundoff(FloatType::bf16)) + 8e-5 : 0.0);
}

// Of float type `type` where that is rounded to.
template <class Read>
void check_sum(const char* name, const char* what, const Sum& want, double error, double rounding,
               const Read& got) {
  bool same = true;
  for (size_t i = 0; i < want.value.size(); ++i) {
    const double inner = error * want.size[i];
    const double bound = inner + rounding * (fabs(want.value[i]) + inner);
    same &= fabs(double(got(int64_t(i))) - want.value[i]) <= bound + 0x1p-25;
  }
  CHECK(same, "%s: grad_%s differs", name, what);
}

void check_kernels(const KernelEntry<const BlockAttentionBackwardKernels*>& entry,
                   const AttentionShape& s, const Attention& p, const Gradients& g,
                   Guarded* memory) {
  running = entry.name;
  const FloatType type = p.args.type;
  for (const Against side : kSides) {
    memory->restart(side);
    BlockAttentionBackwardArgs b{};
    BlockAttentionArgs& a = b.forward;
    a = p.args;
    a.sequences = &p.sequence;
    a.q = memory->copy(p.q);
    a.k = memory->copy(p.k);
    a.v = memory->copy(p.v);
    if (s.block_m > 0) {
      a.blocks = {p.indptr.data(), memory->copy(p.indices)};
      a.columns = {p.column_indptr.data(), memory->copy(p.columns)};
    }
    a.o = memory->copy(g.o);
    a.lse = memory->copy(g.lse);
    b.grad_o = memory->copy(g.grad_o);
    b.grad_lse = memory->copy(g.grad_lse);
    a.packed_unit_bytes = entry.fn->packed_unit_bytes(a);
    const int64_t units = div_up(s.keys, kUnitKeys);
    const int64_t all_units = units * s.kv_heads;
    a.packed = memory->empty<uint8_t>(size_t(all_units * a.packed_unit_bytes));
    uint8_t* scratch = memory->empty<uint8_t>(size_t(round_up(entry.fn->scratch_bytes(a), 64)));
    float* sums = memory->empty<float>(size_t(all_units * sums_of_unit(a)));
    std::fill_n(sums, all_units * sums_of_unit(a), 0.0f);
    b.grad_q = memory->empty<uint8_t>(p.q.size());
    entry.fn->pack(a, all_units / 2, all_units);
    entry.fn->pack(a, 0, all_units / 2);
    each_tile(s, a, nullptr, [&](const QueryTile& tile) {
      const int64_t kv_head = tile.head / (s.heads / s.kv_heads);
      entry.fn->tile(b, tile, sums + kv_head * units * sums_of_unit(a), scratch);
    });
    const auto summed = [&](int64_t i, int64_t d, int64_t first_panel) {
      const int64_t key = i / d / s.kv_heads;
      const int64_t unit = i / d % s.kv_heads * units + key / kUnitKeys;
      const int64_t panel = first_panel + i % d / kQueryTile;
      const float* line =
          sums + unit * sums_of_unit(a) + (panel * kUnitKeys + key % kUnitKeys) * kQueryTile;
      return line[i % d % kQueryTile];
    };
    const bool rounds = entry.isa >= Isa::avx512bf16 && type == FloatType::bf16;
    const double error = relative_error(s, rounds);
    check_sum(entry.name, "q", g.q, error, double(roundoff(type)),
              [&](int64_t i) { return read(b.grad_q, type, i); });
    check_sum(entry.name, "k", g.k, error, 0.0, [&](int64_t i) { return summed(i, s.d, 0); });
    check_sum(entry.name, "v", g.v, error, 0.0,
              [&](int64_t i) { return summed(i, s.dv, panels_of(s.d)); });
    CHECK(memory->intact(), "%s: wrote outside of its memory", entry.name);
  }
}

// Gradients of two sequences do not depend on the number of threads.
void check_driver() {
  const AttentionShape s{200, 200, 4, 2, 32, 32, {true, 0, 0, 0}, 0, 0};
  const Attention p = make_attention(s, FloatType::f32);
  const Gradients g = make_gradients(s, p);
  AttentionSequence parts[2] = {{}, {}};
  for (int i = 0; i < 2; ++i) {
    parts[i] = {100,
                100,
                i * 100 * 4 * 32,
                i * 100 * 2 * 32,
                i * 100 * 2 * 32,
                i * 100,
                i * 100,
                0,
                i * div_up(int64_t{100}, kUnitKeys)};
  }
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    const auto run = [&](const Parallel& parallel) {
      BlockAttentionBackwardArgs b{};
      BlockAttentionArgs& a = b.forward;
      a = p.args;
      a.sequences = parts;
      a.sequence_count = 2;
      a.q = p.q.data();
      a.k = p.k.data();
      a.v = p.v.data();
      a.o = const_cast<uint8_t*>(g.o.data());
      a.lse = const_cast<float*>(g.lse.data());
      b.grad_o = g.grad_o.data();
      b.grad_lse = g.grad_lse.data();
      const BlockAttentionBackwardPlan plan =
          plan_block_attention_backward(a, Isa(tier), parallel.threads);
      const size_t floats_of[] = {p.q.size() / 4, p.k.size() / 4, p.v.size() / 4};
      std::vector<float> results(floats_of[0] + floats_of[1] + floats_of[2], NAN);
      b.grad_q = results.data();
      b.grad_k = results.data() + floats_of[0];
      b.grad_v = results.data() + floats_of[0] + floats_of[1];
      Bytes memory(
          size_t(plan.packed_bytes + plan.sum_count * 4 + plan.tasks * plan.scratch_bytes + 64),
          Guarded::kPoison);
      const auto at = reinterpret_cast<uintptr_t>(memory.data());
      a.packed = memory.data() + (64 - at % 64) % 64;
      a.packed_unit_bytes = plan.packed_unit_bytes;
      float* sums = reinterpret_cast<float*>(a.packed + plan.packed_bytes);
      block_attention_backward(b, plan, reinterpret_cast<uint8_t*>(sums + plan.sum_count), sums,
                               parallel);
      return results;
    };
    const std::vector<float> whole = run(serial_parallel());
    CHECK(std::none_of(whole.begin(), whole.end(), [](float x) { return isnan(x); }),
          "block_attention_backward: %s: leaves a gradient out", isa_name(Isa(tier)));
    for (const int64_t threads : {2, 3, 7}) {
      CHECK(run(reversed_parallel(threads)) == whole,
            "block_attention_backward: %s: depends on %d threads", isa_name(Isa(tier)),
            int(threads));
    }
  }
}

}  // namespace

void check_block_attention_backward(Guarded* memory) {
  for (const AttentionShape& shape : kAttentionShapes) {
    for (const FloatType type : kTypes) {
      const Attention p = make_attention(shape, type);
      const Gradients g = make_gradients(shape, p);
      for (const auto& entry : kGradients) {
        if (entry.isa > detected_isa() || entry.key != int32_t(type)) continue;
        check_kernels(entry, shape, p, g, memory);
      }
    }
  }
  check_driver();
}

}  // namespace ow::testing
