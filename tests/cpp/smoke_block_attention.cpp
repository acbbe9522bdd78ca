// The block attention kernels and their driver, and the merging of states.
#include <math.h>

#include <algorithm>

#include "kernels/block_attention/block_attention.h"
#include "kernels/merge_states/merge_states.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<const BlockAttentionKernels*> kAttention[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_BLOCK_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
};
const KernelEntry<MergeStatesFn> kMerges[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_MERGE_STATES_KERNELS(OW_ROW)
#undef OW_ROW
};

struct Shape {
  int64_t queries, keys, heads, kv_heads, d, dv;
  AttentionMask mask;
  int64_t block_m, block_n;  // 0: no lists
};
constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, {true, 0, 0, 0}, 0, 0},
    {65, 65, 2, 1, 64, 64, {true, 0, 0, 0}, 0, 0},
    {70, 40, 2, 2, 33, 17, {true, 0, 0, 0}, 0, 0},
    {33, 300, 1, 1, 80, 96, {false, 0, 0, 0}, 0, 0},
    {90, 130, 2, 1, 16, 40, {true, 37, 5, 3}, 0, 0},
    {100, 131, 2, 1, 31, 16, {true, 0, 0, 0}, 32, 48},
    {100, 290, 2, 2, 64, 16, {true, 90, 70, 0}, 128, 16},
    {50, 161, 1, 1, 8, 130, {false, 0, 0, 0}, 16, 128},
};

// One sequence; operands end with the last element that may be read.
struct Attention {
  BlockAttentionArgs args{};
  AttentionSequence sequence{};
  Bytes q, k, v;
  std::vector<int32_t> indptr, indices, column_indptr, columns;
  std::vector<uint8_t> score_rows;
  // The formula in double: o, lse and scores.
  std::vector<double> o, reach, lse, scores;
};

// Every other block or so, and every ninth of the other keys.
void make_lists(const Shape& s, Attention* p) {
  for (int64_t head = 0; head < s.heads; ++head) {
    p->indptr.push_back(int32_t(p->indices.size()));
    p->column_indptr.push_back(int32_t(p->columns.size()));
    for (int64_t row = 0; row < div_up(s.queries, s.block_m); ++row) {
      for (int64_t c = 0; c < div_up(s.keys, s.block_n); ++c) {
        if (rng.below(2) == 0) {
          p->indices.push_back(int32_t(c));
          continue;
        }
        for (int64_t j = c * s.block_n; j < std::min((c + 1) * s.block_n, s.keys); ++j) {
          if (rng.below(9) == 0) p->columns.push_back(int32_t(j));
        }
      }
      p->indptr.push_back(int32_t(p->indices.size()));
      p->column_indptr.push_back(int32_t(p->columns.size()));
    }
  }
}

bool listed(const Shape& s, const Attention& p, int64_t head, int64_t i, int64_t j) {
  if (s.block_m == 0) return true;
  const size_t at = size_t(head * (div_up(s.queries, s.block_m) + 1) + i / s.block_m);
  const auto holds = [&](const std::vector<int32_t>& indptr, const std::vector<int32_t>& items,
                         int64_t item) {
    return std::find(items.begin() + indptr[at], items.begin() + indptr[at + 1], item) !=
           items.begin() + indptr[at + 1];
  };
  return holds(p.indptr, p.indices, j / s.block_n) || holds(p.column_indptr, p.columns, j);
}

bool visible(const Shape& s, int64_t i, int64_t j) {
  const int64_t distance = s.keys - s.queries + i - j;
  return !s.mask.causal || (distance >= s.mask.min_distance && distance >= 0 &&
                            (s.mask.window == 0 || distance < s.mask.window || j < s.mask.sinks));
}

void add_formula(const Shape& s, Attention* p, int64_t i, int64_t head) {
  const BlockAttentionArgs& a = p->args;
  const int64_t kv_head = head / (s.heads / s.kv_heads);
  std::vector<double> weights(size_t(s.keys), 0.0);
  double total = 0.0;
  for (int64_t j = 0; j < s.keys; ++j) {
    if (!visible(s, i, j) || !listed(s, *p, head, i, j)) continue;
    double score = 0.0;
    for (int64_t c = 0; c < s.d; ++c) {
      score += double(read(p->q.data(), a.type, (i * s.heads + head) * s.d + c)) *
               double(read(p->k.data(), a.type, (j * s.kv_heads + kv_head) * s.d + c));
    }
    total += weights[size_t(j)] = exp(double(a.scale) * score);
  }
  p->lse.push_back(log(total));
  for (double& weight : weights) weight /= total > 0.0 ? total : 1.0;
  for (int64_t c = 0; c < s.dv; ++c) {
    double sum = 0.0;
    double size = 0.0;
    for (int64_t j = 0; j < s.keys; ++j) {
      const double value = double(read(p->v.data(), a.type, (j * s.kv_heads + kv_head) * s.dv + c));
      sum += weights[size_t(j)] * value;
      size += weights[size_t(j)] * fabs(value);
    }
    p->o.push_back(sum);
    p->reach.push_back(size);
  }
  if (!p->score_rows[size_t(i)]) return;
  for (int64_t j = 0; j < s.keys; ++j) {
    p->scores[size_t(head * s.keys + j)] += weights[size_t(j)];
  }
}

Attention make_attention(const Shape& s, FloatType type) {
  Attention p;
  BlockAttentionArgs& a = p.args;
  a.heads = s.heads;
  a.kv_heads = s.kv_heads;
  a.d = s.d;
  a.dv = s.dv;
  a.type = type;
  a.scale = 1.0f / sqrtf(float(s.d));
  a.mask = s.mask;
  p.sequence.queries = s.queries;
  p.sequence.keys = s.keys;
  a.sequence_count = 1;
  p.q = floats(s.queries * s.heads * s.d, type, 2.0f);
  p.k = floats(s.keys * s.kv_heads * s.d, type, 2.0f);
  p.v = floats(s.keys * s.kv_heads * s.dv, type, 1.0f);
  a.q_strides = {s.heads * s.d, s.d};
  a.k_strides = {s.kv_heads * s.d, s.d};
  a.v_strides = {s.kv_heads * s.dv, s.dv};
  a.index_heads = s.block_m == 0 ? 1 : s.heads;
  a.block_m = a.block_n = 1;
  if (s.block_m > 0) {
    a.block_m = s.block_m;
    a.block_n = s.block_n;
    a.index_rows = div_up(s.queries, s.block_m);
    make_lists(s, &p);
  }
  for (int64_t i = 0; i < s.queries; ++i) p.score_rows.push_back(uint8_t(i % 5 != 3));
  p.scores.resize(size_t(s.heads * s.keys));
  a.score_stride = s.keys;
  for (int64_t i = 0; i < s.queries; ++i) {
    for (int64_t head = 0; head < s.heads; ++head) add_formula(s, &p, i, head);
  }
  return p;
}

// Of weights: scores of up to 4 d / sqrt(d), d + 8 roundings each, and the exponential.
double weight_error(const BlockAttentionArgs& a, const Shape& s) {
  const double scores = 0x1p-24 * double(a.d + 8) * 4.0 * sqrt(double(a.d));
  const double sums = 0x1p-24 * double(s.keys + 10);
  return scores + sums + (a.type == FloatType::bf16 ? 8e-5 : 0.0);
}

void check_results(const char* name, const Shape& s, const Attention& p, const void* o,
                   const float* lse, const float* scores) {
  const FloatType type = p.args.type;
  const double error = weight_error(p.args, s);
  const double rounding = type == FloatType::bf16 ? double(roundoff(type)) : 0.0;
  bool same = true;
  for (size_t i = 0; i < p.o.size(); ++i) {
    const double inner = (2.0 * error + rounding) * p.reach[i];
    const double bound = inner + double(roundoff(type)) * (fabs(p.o[i]) + inner);
    same &= fabs(double(read(o, type, int64_t(i))) - p.o[i]) <= bound + 0x1p-25;
  }
  CHECK(same, "%s: o of %d queries, %d keys, d %d, type %d differs", name, int(s.queries),
        int(s.keys), int(s.d), int(type));
  same = true;
  for (size_t i = 0; i < p.lse.size(); ++i) {
    same &= double(lse[i]) == p.lse[i] ||
            fabs(double(lse[i]) - p.lse[i]) <= error + 0x1p-21 * (1.0 + fabs(p.lse[i]));
  }
  CHECK(same, "%s: lse of %d queries, %d keys differs", name, int(s.queries), int(s.keys));
  same = true;
  for (size_t i = 0; i < p.scores.size(); ++i) {
    const double bound = (2.0 * error + rounding + 0x1p-24 * double(s.queries)) * p.scores[i];
    same &= fabs(double(scores[i]) - p.scores[i]) <= bound + 1e-37;
  }
  CHECK(same, "%s: scores of %d queries, %d keys differ", name, int(s.queries), int(s.keys));
}

// Tile `first` .. of one head.
QueryTile tile_of(const Shape& s, const BlockAttentionArgs& a, int64_t head, int64_t first,
                  int64_t count, float* scores) {
  QueryTile tile{};
  tile.sequence = a.sequences;
  tile.head = head;
  tile.first = first;
  tile.count = count;
  tile.scores = scores + head * s.keys;
  if (s.block_m > 0) {
    const int64_t at = head * (a.index_rows + 1) + first / s.block_m;
    tile.blocks = {a.blocks.items + a.blocks.indptr[at], a.blocks.items + a.blocks.indptr[at + 1]};
    tile.columns = {a.columns.items + a.columns.indptr[at],
                    a.columns.items + a.columns.indptr[at + 1]};
  }
  return tile;
}

void check_kernels(const KernelEntry<const BlockAttentionKernels*>& entry, const Shape& s,
                   const Attention& p, Guarded* memory) {
  running = entry.name;
  for (const Against side : kSides) {
    memory->restart(side);
    BlockAttentionArgs a = p.args;
    a.sequences = &p.sequence;
    a.q = memory->copy(p.q);
    a.k = memory->copy(p.k);
    a.v = memory->copy(p.v);
    a.score_rows = memory->copy(p.score_rows);
    if (s.block_m > 0) {
      a.blocks = {p.indptr.data(), memory->copy(p.indices)};
      a.columns = {p.column_indptr.data(), memory->copy(p.columns)};
    }
    a.packed_unit_bytes = entry.fn->packed_unit_bytes(a);
    const int64_t units = div_up(s.keys, kUnitKeys) * s.kv_heads;
    a.packed = memory->empty<uint8_t>(size_t(units * a.packed_unit_bytes));
    uint8_t* scratch = memory->empty<uint8_t>(size_t(round_up(entry.fn->scratch_bytes(a), 64)));
    a.o = memory->empty<uint8_t>(p.o.size() * size_t(float_size(a.type)));
    std::vector<float> lse(p.lse.size());
    std::vector<float> scores(p.scores.size(), 0.0f);
    // In two calls, the later units first: a call must keep to its own.
    entry.fn->pack(a, units / 2, units);
    entry.fn->pack(a, 0, units / 2);
    const int64_t rows = s.block_m > 0 ? s.block_m : kQueryTile;
    for (int64_t head = 0; head < s.heads; ++head) {
      for (int64_t first = 0; first < s.queries; first += min_of(rows, kQueryTile)) {
        const int64_t in_block = rows - first % rows;
        const int64_t count = min_of(min_of(in_block, kQueryTile), s.queries - first);
        QueryTile tile = tile_of(s, a, head, first, count, scores.data());
        entry.fn->attend(a, tile, scratch);
        for (int64_t i = 0; i < count; ++i) {
          const float log2_sum = tile.m[i] + log2f(tile.l[i]);
          lse[size_t((first + i) * s.heads + head)] =
              tile.l[i] == 0.0f ? -INFINITY : log2_sum * 0.693147181f;
        }
      }
    }
    check_results(entry.name, s, p, a.o, lse.data(), scores.data());
    CHECK(memory->intact(), "%s: wrote outside of its memory", entry.name);
  }
}

void check_driver() {
  // Work for seven tasks, of two sequences.
  const Shape s{200, 200, 4, 2, 32, 32, {true, 0, 0, 0}, 64, 32};
  for (const FloatType type : {FloatType::f32, FloatType::bf16}) {
    const Attention p = make_attention(s, type);
    AttentionSequence parts[2] = {{}, {}};
    for (int i = 0; i < 2; ++i) {
      parts[i] = {100, 100, i * 100 * 4 * 32, i * 100 * 2 * 32, i * 100 * 2 * 32, i * 100, i * 100,
                  0,   0};
    }
    parts[1].unit = div_up(int64_t{100}, kUnitKeys);
    for (int tier = 0; tier <= int(detected_isa()); ++tier) {
      const auto run = [&](const Parallel& parallel) {
        BlockAttentionArgs a = p.args;
        a.sequences = parts;
        a.sequence_count = 2;
        a.q = p.q.data();
        a.k = p.k.data();
        a.v = p.v.data();
        a.index_heads = 1;
        a.score_rows = p.score_rows.data();
        const BlockAttentionPlan plan = plan_block_attention(a, Isa(tier), parallel.threads);
        std::vector<float> results(size_t(200 * 4 * 33 + 4 * 200), 0.0f);
        a.o = results.data();
        a.lse = results.data() + 200 * 4 * 32;
        a.scores = a.lse + 200 * 4;
        std::vector<float> partial(size_t(plan.partial_score_count), -1.0f);
        Bytes memory(size_t(plan.packed_bytes + plan.tasks * plan.scratch_bytes + 64),
                     Guarded::kPoison);
        const auto at = reinterpret_cast<uintptr_t>(memory.data());
        a.packed = memory.data() + (64 - at % 64) % 64;
        a.packed_unit_bytes = plan.packed_unit_bytes;
        block_attention(a, plan, a.packed + plan.packed_bytes, partial.data(), parallel);
        return results;
      };
      const auto whole = run(serial_parallel());
      for (const int64_t threads : {2, 3, 7}) {
        CHECK(run(reversed_parallel(threads)) == whole,
              "block_attention: %s: depends on %d threads", isa_name(Isa(tier)), int(threads));
      }
    }
  }
}

void check_merges(Guarded* memory) {
  for (const auto& entry : kMerges) {
    if (entry.isa > detected_isa()) continue;
    running = entry.name;
    for (const FloatType type : kTypes) {
      for (const int64_t d : {1, 7, 16, 33}) {
        for (const Against side : kSides) {
          memory->restart(side);
          const std::vector<float> lse1 = {0.5f, -INFINITY, -INFINITY};
          const std::vector<float> lse2 = {-1.0f, 2.0f, -INFINITY};
          const Bytes o1 = floats(3 * d, type, 1.0f);
          const Bytes o2 = floats(3 * d, type, 1.0f);
          MergeStatesArgs a{3,
                            d,
                            type,
                            memory->copy(o1),
                            memory->copy(lse1),
                            memory->copy(o2),
                            memory->copy(lse2),
                            nullptr,
                            nullptr};
          a.o = memory->empty<uint8_t>(o1.size());
          a.lse = memory->empty<float>(3);
          entry.fn(a, 1, 3);
          entry.fn(a, 0, 1);
          const double total = exp(0.5) + exp(-1.0);
          bool same = fabs(double(a.lse[0]) - log(total)) <= 1e-6 && a.lse[1] == 2.0f &&
                      a.lse[2] == -INFINITY;
          for (int64_t i = 0; i < d; ++i) {
            const double want = (exp(0.5) * double(read(o1.data(), type, i)) +
                                 exp(-1.0) * double(read(o2.data(), type, i))) /
                                total;
            same &= fabs(double(read(a.o, type, i)) - want) <= double(roundoff(type)) + 1e-6;
            same &= read(a.o, type, d + i) == read(o2.data(), type, d + i);
            same &= read(a.o, type, 2 * d + i) == 0.0f;
          }
          CHECK(same, "%s: d %d, type %d differs", entry.name, int(d), int(type));
          CHECK(memory->intact(), "%s: wrote outside of o or lse", entry.name);
        }
      }
    }
  }
}

}  // namespace

void check_block_attention(Guarded* memory) {
  for (const Shape& shape : kShapes) {
    for (const FloatType type : kTypes) {
      const Attention p = make_attention(shape, type);
      for (const auto& entry : kAttention) {
        if (entry.isa > detected_isa() || entry.key != int32_t(type)) continue;
        check_kernels(entry, shape, p, memory);
      }
    }
  }
  check_driver();
  check_merges(memory);
}

}  // namespace ow::testing
