#include <cstring>

#include "kernels/block_attention/block_attention.h"

namespace ow {
namespace {

constexpr KernelEntry<const BlockAttentionBackwardKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_BLOCK_ATTENTION_GRADIENTS(OW_ROW)
#undef OW_ROW
};

// Parts there are at least, if there are as many tiles: enough to share the work of few heads. Each
// has sums of its own, so more of them cost memory.
constexpr int64_t kParts = 8;
// Multiply-adds below which another thread costs more than it saves (about 4 us).
constexpr int64_t kWorkPerTask = 1 << 17;

// Tiles first, first + step, ... of all heads that read one key head of a sequence.
struct Part {
  int64_t sequence, kv_head, first, step, units;
};

int64_t parts_of(const BlockAttentionArgs& a, int64_t sequence) {
  const int64_t parts = div_up(kParts, a.sequence_count * a.kv_heads);
  const int64_t tiles = attention_tiles(a, sequence);
  return tiles < 1 ? 1 : min_of(parts, tiles);
}

// All parts, in order of sequence, key head, first tile.
template <class Visit>
void each_part(const BlockAttentionArgs& a, const Visit& visit) {
  for (int64_t s = 0; s < a.sequence_count; ++s) {
    const int64_t parts = parts_of(a, s);
    const int64_t units = div_up(a.sequences[s].keys, kUnitKeys);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      for (int64_t i = 0; i < parts; ++i) visit(Part{s, head, i, parts, units});
    }
  }
}

template <class Visit>
void each_tile(const BlockAttentionArgs& a, const Part& part, const Visit& visit) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tiles = attention_tiles(a, part.sequence);
  for (int64_t head = part.kv_head * group; head < (part.kv_head + 1) * group; ++head) {
    for (int64_t i = part.first; i < tiles; i += part.step) {
      const QueryTile tile = attention_tile(a, part.sequence, head, i);
      if (tile.count > 0) visit(tile);
    }
  }
}

int64_t cost_of(const BlockAttentionArgs& a, const Part& part) {
  int64_t cost = 0;
  each_tile(a, part, [&](const QueryTile& tile) { cost += attention_tile_cost(a, tile); });
  return cost;
}

// Rows of one operand of a unit, [keys, kv_heads, d]: the sums of its parts, in order.
template <class T>
void write_rows(const BlockAttentionArgs& a, const float* sums, int64_t part_stride, int64_t parts,
                int64_t keys, int64_t d, T* out) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t c = 0; c < d; ++c) {
      const float* at = sums + (c / kQueryTile * kUnitKeys + j) * kQueryTile + c % kQueryTile;
      float total = at[0];
      for (int64_t p = 1; p < parts; ++p) total += at[p * part_stride];
      from_float(total, out + j * a.kv_heads * d + c);
    }
  }
}

// grad_k and grad_v of one key head of a sequence, whose first key is row `row`.
template <class T>
void write_keys(const BlockAttentionBackwardArgs& b, const Part& part, int64_t row,
                const float* sums, int64_t unit) {
  const BlockAttentionArgs& a = b.forward;
  const int64_t keys = min_of(a.sequences[part.sequence].keys - unit * kUnitKeys, kUnitKeys);
  const int64_t stride = part.units * sums_of_unit(a);
  const int64_t at = (row + unit * kUnitKeys) * a.kv_heads + part.kv_head;
  const float* unit_sums = sums + unit * sums_of_unit(a);
  write_rows(a, unit_sums, stride, part.step, keys, a.d, static_cast<T*>(b.grad_k) + at * a.d);
  write_rows(a, unit_sums + panels_of(a.d) * kUnitKeys * kQueryTile, stride, part.step, keys, a.dv,
             static_cast<T*>(b.grad_v) + at * a.dv);
}

void write_keys_of(const BlockAttentionBackwardArgs& b, const float* sums,
                   const Parallel& parallel) {
  const BlockAttentionArgs& a = b.forward;
  int64_t row = 0;
  int64_t sequence = 0;
  each_part(a, [&](const Part& part) {
    for (; sequence < part.sequence; ++sequence) row += a.sequences[sequence].keys;
    const float* mine = sums;
    sums += part.units * sums_of_unit(a);
    if (part.first != 0) return;
    const int64_t tasks = min_of(parallel.threads, part.units);
    parallel.for_each(tasks, [&](int64_t task) {
      const int64_t end = part.units * (task + 1) / tasks;
      for (int64_t unit = part.units * task / tasks; unit < end; ++unit) {
        switch (a.type) {
          case FloatType::f32: write_keys<float>(b, part, row, mine, unit); break;
          case FloatType::bf16: write_keys<bf16>(b, part, row, mine, unit); break;
          case FloatType::f16: write_keys<f16>(b, part, row, mine, unit); break;
        }
      }
    });
  });
}

}  // namespace

BlockAttentionBackwardPlan plan_block_attention_backward(const BlockAttentionArgs& args, Isa isa,
                                                         int64_t threads) {
  BlockAttentionBackwardPlan plan{};
  plan.kernels = pick(kTable, isa, int32_t(args.type), kAnyM).fn;
  plan.packed_unit_bytes = plan.kernels->packed_unit_bytes(args);
  plan.packed_bytes = plan.packed_unit_bytes * attention_units(args);
  plan.scratch_bytes = round_up(plan.kernels->scratch_bytes(args), 64);
  int64_t parts = 0;
  int64_t cost = 0;
  each_part(args, [&](const Part& part) {
    ++parts;
    cost += cost_of(args, part);
    plan.sum_count += part.units * sums_of_unit(args);
  });
  const int64_t work = cost * kQueryTile * (args.d + args.dv);
  plan.tasks = min_of(min_of(threads, parts), work < kWorkPerTask ? 1 : work / kWorkPerTask);
  return plan;
}

void block_attention_backward(const BlockAttentionBackwardArgs& args,
                              const BlockAttentionBackwardPlan& plan, uint8_t* scratch, float* sums,
                              const Parallel& parallel) {
  const BlockAttentionArgs& a = args.forward;
  const int64_t units = attention_units(a);
  parallel.for_each(plan.tasks, [&](int64_t task) {
    plan.kernels->pack(a, units * task / plan.tasks, units * (task + 1) / plan.tasks);
  });
  int64_t total = 0;
  each_part(a, [&](const Part& part) { total += cost_of(a, part); });
  // A part belongs to the task in whose share of the cost its middle is.
  parallel.for_each(plan.tasks, [&](int64_t task) {
    int64_t before = 0;
    float* mine = sums;
    each_part(a, [&](const Part& part) {
      const int64_t count = part.units * sums_of_unit(a);
      const int64_t cost = cost_of(a, part);
      const int64_t middle = before + cost / 2;
      if (min_of(middle * plan.tasks / (total > 0 ? total : 1), plan.tasks - 1) == task) {
        std::memset(mine, 0, size_t(count) * sizeof(float));
        each_tile(a, part, [&](const QueryTile& tile) {
          plan.kernels->tile(args, tile, mine, scratch + task * plan.scratch_bytes);
        });
      }
      before += cost;
      mine += count;
    });
  });
  write_keys_of(args, sums, parallel);
}

}  // namespace ow
