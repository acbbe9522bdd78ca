// The block attention kernels and their driver, and the merging of states.
#include "smoke_block_attention.h"

#include "kernels/merge_states/merge_states.h"

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

void check_results(const char* name, const AttentionShape& s, const Attention& p, const void* o,
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

// How tiles are computed: over units that are laid out before, one head at a time, or by
// themselves, the heads of a group together where that is possible.
enum class Layout { shared, own };

void check_kernels(const KernelEntry<const BlockAttentionKernels*>& entry, const AttentionShape& s,
                   const Attention& p, Layout layout, Guarded* memory) {
  running = entry.name;
  const int64_t group = s.heads / s.kv_heads;
  const bool together =
      layout == Layout::own && s.block_m == 0 && s.queries * group <= kQueryTile && group > 1;
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
    if (layout == Layout::shared) {
      a.packed = memory->empty<uint8_t>(size_t(units * a.packed_unit_bytes));
    }
    uint8_t* scratch = memory->empty<uint8_t>(size_t(round_up(entry.fn->scratch_bytes(a), 64)));
    a.o = memory->empty<uint8_t>(p.o.size() * size_t(float_size(a.type)));
    std::vector<float> lse(p.lse.size());
    std::vector<float> scores(p.scores.size(), 0.0f);
    if (layout == Layout::shared) {
      // In two calls, the later units first: a call must keep to its own.
      entry.fn->pack(a, units / 2, units);
      entry.fn->pack(a, 0, units / 2);
    }
    each_tile(s, a, scores.data(), [&](QueryTile tile) {
      if (together && tile.head % group != 0) return;
      if (together) {
        tile.heads = group;
        tile.scores = nullptr;
      }
      entry.fn->attend(a, tile, scratch);
      for (int64_t i = 0; i < tile.heads * tile.count; ++i) {
        const float log2_sum = tile.m[i] + log2f(tile.l[i]);
        lse[size_t((tile.first + i % tile.count) * s.heads + tile.head + i / tile.count)] =
            tile.l[i] == 0.0f ? -INFINITY : log2_sum * 0.693147181f;
      }
    });
    if (together) std::copy(p.scores.begin(), p.scores.end(), scores.begin());
    check_results(entry.name, s, p, a.o, lse.data(), scores.data());
    CHECK(memory->intact(), "%s: wrote outside of its memory", entry.name);
  }
}

void check_driver() {
  // Work for seven tasks, of two sequences.
  const AttentionShape s{200, 200, 4, 2, 32, 32, {true, 0, 0, 0}, 64, 32};
  for (const FloatType type : {FloatType::f32, FloatType::bf16}) {
    const Attention p = make_attention(s, type);
    AttentionSequence parts[2] = {{}, {}};
    for (int i = 0; i < 2; ++i) {
      parts[i] = {100, 100, i * 100 * 4 * 32, i * 100 * 2 * 32, i * 100 * 2 * 32, i * 100, i * 100,
                  0,   0};
    }
    parts[1].unit = div_up(int64_t{100}, kUnitKeys);
    for (int tier = 0; tier <= int(detected_isa()); ++tier) {
      // Without heads of a pass, tiles lay out keys and values for themselves.
      const auto run = [&](const Parallel& parallel, int64_t pass_heads = 2) {
        BlockAttentionArgs a = p.args;
        a.sequences = parts;
        a.sequence_count = 2;
        a.q = p.q.data();
        a.k = p.k.data();
        a.v = p.v.data();
        a.index_heads = 1;
        a.score_rows = p.score_rows.data();
        BlockAttentionPlan plan = plan_block_attention(a, Isa(tier), parallel.threads);
        plan.pass_heads = pass_heads > 0 ? pass_heads : 2;
        plan.packed_bytes = plan.packed_unit_bytes * attention_units(a) * (pass_heads > 0);
        std::vector<float> results(size_t(200 * 4 * 33 + 4 * 200), 0.0f);
        a.o = results.data();
        a.lse = results.data() + 200 * 4 * 32;
        a.scores = a.lse + 200 * 4;
        std::vector<float> partial(size_t(plan.partial_score_count), -1.0f);
        Bytes memory(size_t(plan.packed_bytes + plan.tasks * plan.scratch_bytes + 64),
                     Guarded::kPoison);
        const auto at = reinterpret_cast<uintptr_t>(memory.data());
        uint8_t* aligned = memory.data() + (64 - at % 64) % 64;
        a.packed = pass_heads > 0 ? aligned : nullptr;
        a.packed_unit_bytes = plan.packed_unit_bytes;
        block_attention(a, plan, aligned + plan.packed_bytes, partial.data(), parallel);
        return results;
      };
      const auto whole = run(serial_parallel());
      for (const int64_t threads : {2, 3, 7}) {
        CHECK(run(reversed_parallel(threads)) == whole,
              "block_attention: %s: depends on %d threads", isa_name(Isa(tier)), int(threads));
      }
      for (const int64_t pass_heads : {0, 1}) {
        CHECK(run(serial_parallel(), pass_heads) == whole,
              "block_attention: %s: depends on the heads of a pass", isa_name(Isa(tier)));
      }
    }
  }
}

// Few queries, whose heads share tiles, over keys that no other tile reads: the driver lays out
// nothing, and with a window that hides most of them, either.
void check_few_queries() {
  for (const AttentionMask mask : {AttentionMask{true, 0, 0, 0}, AttentionMask{true, 30, 2, 1}}) {
    const AttentionShape s{20, 200, 16, 4, 32, 40, mask, 0, 0};
    for (const FloatType type : kTypes) {
      const Attention p = make_attention(s, type);
      for (int tier = 0; tier <= int(detected_isa()); ++tier) {
        std::vector<float> before;
        for (const int64_t threads : {1, 2, 7}) {
          BlockAttentionArgs a = p.args;
          a.sequences = &p.sequence;
          a.q = p.q.data();
          a.k = p.k.data();
          a.v = p.v.data();
          const Parallel parallel = reversed_parallel(threads);
          const BlockAttentionPlan plan = plan_block_attention(a, Isa(tier), threads);
          Bytes memory(size_t(plan.tasks * plan.scratch_bytes + 64), Guarded::kPoison);
          const auto at = reinterpret_cast<uintptr_t>(memory.data());
          std::vector<float> o(p.o.size()), lse(p.lse.size());
          a.o = o.data();
          a.lse = lse.data();
          CHECK(plan.packed_bytes == 0, "block_attention: lays out keys that are read once");
          block_attention(a, plan, memory.data() + (64 - at % 64) % 64, nullptr, parallel);
          const std::vector<float> same(p.scores.begin(), p.scores.end());
          check_results(isa_name(Isa(tier)), s, p, o.data(), lse.data(), same.data());
          CHECK(before.empty() || before == lse, "block_attention: %s: depends on %d threads",
                isa_name(Isa(tier)), int(threads));
          before = lse;
        }
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
  for (const AttentionShape& shape : kAttentionShapes) {
    for (const FloatType type : kTypes) {
      const Attention p = make_attention(shape, type);
      for (const auto& entry : kAttention) {
        if (entry.isa > detected_isa() || entry.key != int32_t(type)) continue;
        for (const Layout layout : {Layout::shared, Layout::own}) {
          check_kernels(entry, shape, p, layout, memory);
        }
      }
    }
  }
  check_driver();
  check_few_queries();
  check_merges(memory);
}

}  // namespace ow::testing
