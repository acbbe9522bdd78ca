#include "kernels/block_attention/block_attention.h"

#include <cmath>
#include <cstring>

namespace ow {
namespace {

constexpr KernelEntry<const BlockAttentionKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_BLOCK_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
};

// Scores of a head are summed in this many parts, each by one task in order of the queries: enough
// to share the work of few heads, and sums do not depend on the number of threads.
constexpr int64_t kScoreParts = 4;
// Tiles that are left, about, where heads share them.
constexpr int64_t kLeastTiles = 8;
// Multiply-adds below which another thread costs more than it saves (about 4 us).
constexpr int64_t kWorkPerTask = 1 << 17;

// Reads of each key, on average, up to which tiles lay out keys and values for themselves.
constexpr int64_t kOwnReads = 3;

// Keys and values laid out at a time, if there is work for all threads in that: they stay in the
// last cache, and allocators give larger pieces back to the system, whose pages then are cleared
// again in every call.
constexpr int64_t kPassBytes = 16 << 20;

// Tiles of a sequence: every block_m queries start a new one.
int64_t block_rows(const BlockAttentionArgs& a) {
  return a.blocks.indptr == nullptr ? kQueryTile : a.block_m;
}
int64_t tiles_in_block(const BlockAttentionArgs& a) { return div_up(block_rows(a), kQueryTile); }

// Query heads of a key head whose queries share a tile, where they read the same keys and tiles of
// one head would not be full. Not so many that few tiles are left to share out.
int64_t heads_of_tile(const BlockAttentionArgs& a, int64_t sequence) {
  if (a.score_rows != nullptr || a.index_heads > a.kv_heads) return 1;
  const int64_t rows = min_of(min_of(block_rows(a), a.sequences[sequence].queries), kQueryTile);
  const int64_t tiles = attention_tiles(a, sequence) * a.heads * a.sequence_count;
  if (2 * rows > kQueryTile || tiles < 2 * kLeastTiles) return 1;
  const int64_t group = a.heads / a.kv_heads;
  return div_up(group, div_up(group, min_of(kQueryTile / rows, tiles / kLeastTiles)));
}

// Units of work: tiles [begin, end) of `heads` heads of a sequence, one after another.
struct Part {
  int64_t sequence, head, heads, begin, end;
};

// All parts of the key heads laid out: of each sequence, tiles of all heads one after another, or
// where scores are summed, head after head.
class Parts {
 public:
  explicit Parts(const BlockAttentionArgs& a) : a_(a) {}

  template <class Visit>
  void each(const Visit& visit) const {
    const int64_t group = a_.heads / a_.kv_heads;
    const int64_t begin = a_.kv_begin * group;
    const int64_t end = a_.kv_end * group;
    for (int64_t s = 0; s < a_.sequence_count; ++s) {
      const int64_t tiles = attention_tiles(a_, s);
      if (a_.score_rows == nullptr) {
        // Heads of a token lie together: their tiles find the pages of q and o at hand.
        const int64_t heads = heads_of_tile(a_, s);
        for (int64_t i = 0; i < tiles; ++i) {
          for (int64_t head = begin; head < end; head += heads_at(head, heads, group)) {
            visit(Part{s, head, heads_at(head, heads, group), i, i + 1});
          }
        }
        continue;
      }
      const int64_t parts = min_of(tiles, kScoreParts);
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t i = 0; i < parts; ++i) {
          visit(Part{s, head, 1, tiles * i / parts, tiles * (i + 1) / parts});
        }
      }
    }
  }

 private:
  // `heads`, or as many as are left of the group.
  static int64_t heads_at(int64_t head, int64_t heads, int64_t group) {
    return min_of(heads, group - head % group);
  }

  const BlockAttentionArgs& a_;
};

// Tile number `index` of a part's heads; empty (count 0) where the last block of a sequence has
// fewer.
QueryTile tile_of(const BlockAttentionArgs& a, const Part& part, int64_t index) {
  QueryTile tile{};
  tile.sequence = &a.sequences[part.sequence];
  tile.head = part.head;
  tile.heads = part.heads;
  const int64_t block = index / tiles_in_block(a);
  const int64_t in_block = index % tiles_in_block(a) * kQueryTile;
  tile.first = block * block_rows(a) + in_block;
  const int64_t rows = min_of(block_rows(a) - in_block, tile.sequence->queries - tile.first);
  tile.count = rows > 0 ? min_of(rows, kQueryTile) : 0;
  const int64_t head = part.head / (a.heads / a.index_heads);
  const int64_t at = head * (a.index_rows + 1) + tile.sequence->index_row + block;
  const auto list = [&](const KeyLists& lists) {
    if (lists.indptr == nullptr) return KeyList{nullptr, nullptr};
    return KeyList{lists.items + lists.indptr[at], lists.items + lists.indptr[at + 1]};
  };
  tile.blocks = list(a.blocks);
  tile.columns = list(a.columns);
  return tile;
}

// Keys that a tile reads, at most: what its time is proportional to.
int64_t cost_of(const BlockAttentionArgs& a, const QueryTile& tile) {
  if (tile.count == 0) return 0;
  const AttentionMask& mask = a.mask;
  const int64_t keys = tile.sequence->keys;
  int64_t seen = keys;
  if (mask.causal) {
    seen = keys - tile.sequence->queries + tile.first + tile.count - mask.min_distance;
    seen = seen < 0 ? 0 : min_of(seen, keys);
    if (mask.window > 0) seen = min_of(seen, mask.window + mask.sinks + tile.count);
  }
  const int64_t listed =
      (tile.blocks.end - tile.blocks.begin) * a.block_n + (tile.columns.end - tile.columns.begin);
  return kUnitKeys + (a.blocks.indptr == nullptr ? seen : min_of(listed, seen));
}

int64_t cost_of(const BlockAttentionArgs& a, const Part& part) {
  int64_t cost = 0;
  for (int64_t i = part.begin; i < part.end; ++i) cost += cost_of(a, tile_of(a, part, i));
  return cost;
}

int64_t all_units(const BlockAttentionArgs& a) {
  const AttentionSequence& last = a.sequences[a.sequence_count - 1];
  return (last.unit + div_up(last.keys, kUnitKeys)) * (a.kv_end - a.kv_begin);
}

bool any_score_row(const BlockAttentionArgs& a, const QueryTile& tile) {
  const uint8_t* rows = a.score_rows + tile.sequence->row + tile.first;
  return std::memchr(rows, 1, size_t(tile.count)) != nullptr;
}

void attend(const BlockAttentionArgs& a, const BlockAttentionKernels& kernels, const Part& part,
            uint8_t* scratch, float* scores) {
  if (scores != nullptr) {
    std::memset(scores, 0, size_t(a.sequences[part.sequence].keys) * sizeof(float));
  }
  for (int64_t index = part.begin; index < part.end; ++index) {
    QueryTile tile = tile_of(a, part, index);
    if (tile.count == 0) continue;
    if (scores != nullptr && any_score_row(a, tile)) tile.scores = scores;
    kernels.attend(a, tile, scratch);
    for (int64_t i = 0; i < tile.heads * tile.count; ++i) {
      constexpr float kLn2 = 0.693147181f;
      const int64_t row = tile.sequence->row + tile.first + i % tile.count;
      a.lse[row * a.heads + tile.head + i / tile.count] =
          tile.l[i] == 0.0f ? -INFINITY : (tile.m[i] + std::log2(tile.l[i])) * kLn2;
    }
  }
}

// Adds the parts of each head, in order.
void sum_scores(const BlockAttentionArgs& a, const float* partial) {
  Parts(a).each([&](const Part& part) {
    const AttentionSequence& sequence = a.sequences[part.sequence];
    float* scores = a.scores + sequence.scores + part.head * a.score_stride;
    for (int64_t j = 0; j < sequence.keys; ++j) scores[j] += partial[j];
    partial += sequence.keys;
  });
}

// The heads of one pass.
void attend_heads(const BlockAttentionArgs& args, const BlockAttentionPlan& plan, uint8_t* scratch,
                  float* partial_scores, const Parallel& parallel) {
  const int64_t units = all_units(args);
  if (args.packed != nullptr) {
    parallel.for_each(plan.tasks, [&](int64_t task) {
      plan.kernels->pack(args, units * task / plan.tasks, units * (task + 1) / plan.tasks);
    });
  }
  int64_t total = 0;
  Parts(args).each([&](const Part& part) { total += cost_of(args, part); });
  // A part belongs to the task in whose share of the cost its middle is.
  parallel.for_each(plan.tasks, [&](int64_t task) {
    int64_t before = 0;
    float* scores = partial_scores;
    Parts(args).each([&](const Part& part) {
      const int64_t cost = cost_of(args, part);
      if (min_of((before + cost / 2) * plan.tasks / total, plan.tasks - 1) == task) {
        attend(args, *plan.kernels, part, scratch + task * plan.scratch_bytes, scores);
      }
      before += cost;
      if (scores != nullptr) scores += args.sequences[part.sequence].keys;
    });
  });
  if (partial_scores != nullptr) sum_scores(args, partial_scores);
}

}  // namespace

BlockAttentionPlan plan_block_attention(const BlockAttentionArgs& args, Isa isa, int64_t threads) {
  BlockAttentionPlan plan{};
  plan.kernels = pick(kTable, isa, int32_t(args.type), kAnyM).fn;
  plan.packed_unit_bytes = plan.kernels->packed_unit_bytes(args);
  plan.scratch_bytes = round_up(plan.kernels->scratch_bytes(args), 64);
  int64_t parts = 0;
  int64_t cost = 0;
  int64_t scores = 0;
  Parts(args).each([&](const Part& part) {
    ++parts;
    cost += cost_of(args, part);
    if (args.score_rows != nullptr) scores += args.sequences[part.sequence].keys;
  });
  const int64_t work = cost * kQueryTile * (args.d + args.dv);
  plan.tasks = min_of(min_of(threads, parts), div_up(work, kWorkPerTask));
  plan.pass_heads = args.kv_heads;
  plan.partial_score_count = scores;
  if (cost - parts * kUnitKeys <= kOwnReads * all_units(args) * kUnitKeys) return plan;
  const int64_t all_bytes = plan.packed_unit_bytes * all_units(args);
  const int64_t passes = min_of(div_up(all_bytes, kPassBytes), parts / (2 * plan.tasks));
  if (passes > 1) plan.pass_heads = div_up(args.kv_heads, passes);
  plan.packed_bytes = all_bytes / args.kv_heads * plan.pass_heads;
  plan.partial_score_count = scores / args.kv_heads * plan.pass_heads;
  return plan;
}

void block_attention(const BlockAttentionArgs& args, const BlockAttentionPlan& plan,
                     uint8_t* scratch, float* partial_scores, const Parallel& parallel) {
  BlockAttentionArgs pass = args;
  for (int64_t head = 0; head < args.kv_heads; head += plan.pass_heads) {
    pass.kv_begin = head;
    pass.kv_end = min_of(head + plan.pass_heads, args.kv_heads);
    attend_heads(pass, plan, scratch, partial_scores, parallel);
  }
}

int64_t attention_tiles(const BlockAttentionArgs& a, int64_t sequence) {
  return div_up(a.sequences[sequence].queries, block_rows(a)) * tiles_in_block(a);
}

QueryTile attention_tile(const BlockAttentionArgs& a, int64_t sequence, int64_t head,
                         int64_t index) {
  return tile_of(a, Part{sequence, head, 1, 0, 0}, index);
}

int64_t attention_tile_cost(const BlockAttentionArgs& a, const QueryTile& tile) {
  return cost_of(a, tile);
}

int64_t attention_units(const BlockAttentionArgs& a) { return all_units(a); }

}  // namespace ow
