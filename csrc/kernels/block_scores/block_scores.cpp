#include "kernels/block_scores/block_scores.h"

#include <string.h>

#include <algorithm>

namespace ow {
namespace {

constexpr KernelEntry<const BlockScoresKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_BLOCK_SCORES_KERNELS(OW_ROW)
#undef OW_ROW
};

// Lanes of the widest vector, which rows of queries are filled up to.
constexpr int64_t kWidest = 16;

// Neighbouring candidates [begin, end), by the score of the first.
struct Group {
  int32_t begin, end;
  float score;
};

// Scratch of one task: packed queries, 2 k groups, and the blocks to score with their scores.
struct Search {
  float* packed;
  Group* groups;
  int32_t* wanted;
  float* scores;
};

int64_t lanes_of(const HipSearchArgs& a) {
  return round_up(div_up(a.block_m, a.query_stride), kWidest);
}
int64_t most_groups(const HipSearchArgs& a) { return 2 * std::min(a.k, a.max_blocks); }

int64_t bytes_of_task(const HipSearchArgs& a) {
  return round_up(a.d * lanes_of(a) * 4 + most_groups(a) * int64_t(sizeof(Group) + 8), 64);
}

Search scratch_of(const HipSearchArgs& a, uint8_t* at) {
  float* packed = reinterpret_cast<float*>(at);
  Group* groups = reinterpret_cast<Group*>(packed + a.d * lanes_of(a));
  int32_t* wanted = reinterpret_cast<int32_t*>(groups + most_groups(a));
  return {packed, groups, wanted, reinterpret_cast<float*>(wanted + most_groups(a))};
}

int64_t tasks_of(const HipSearchArgs& a, const Parallel& parallel) {
  return std::min(parallel.threads, a.queries.count * a.heads * a.max_rows);
}

// Halves every group. The first half keeps the group's score, if it has one; what has none yet is
// scored. Gives the number of groups and adds to `scored`.
int64_t halve(const HipSearchArgs& a, const BlockScoresKernels& kernels, const SearchRow& row,
              const Search& search, int64_t count, bool have_scores, int32_t* scored) {
  int64_t wanted = 0;
  int64_t halves = count;
  for (int64_t g = 0; g < count; ++g) {
    Group& group = search.groups[g];
    if (!have_scores) search.wanted[wanted++] = group.begin;
    if (group.end - group.begin == 1) continue;
    const int32_t middle = group.begin + (group.end - group.begin + 1) / 2;
    search.groups[halves] = {middle, group.end, 0.0f};
    group.end = middle;
    ++halves;
  }
  for (int64_t g = count; g < halves; ++g) search.wanted[wanted++] = search.groups[g].begin;
  kernels.score(a, row, search.wanted, wanted, search.scores);
  const int64_t first = have_scores ? count : 0;
  for (int64_t g = first; g < halves; ++g) search.groups[g].score = search.scores[g - first];
  *scored += int32_t(wanted);
  return halves;
}

void search_row(const HipSearchArgs& a, const BlockScoresKernels& kernels, const SearchRow& row,
                const Search& search, int64_t candidates, uint8_t* blocks, int32_t* scored) {
  if (candidates <= a.k) {
    memset(blocks, 1, size_t(std::max<int64_t>(candidates, 0)));
    return;
  }
  kernels.pack(a, row);
  int64_t count = a.k;
  int64_t longest = 0;
  for (int64_t g = 0; g < count; ++g) {
    const int32_t begin = int32_t(candidates * g / count);
    const int32_t end = int32_t(candidates * (g + 1) / count);
    search.groups[g] = {begin, end, 0.0f};
    longest = std::max<int64_t>(longest, end - begin);
  }
  // Better first; of equal ones the earlier.
  const auto better = [](const Group& x, const Group& y) {
    return x.score != y.score ? x.score > y.score : x.begin < y.begin;
  };
  bool have_scores = false;
  for (; longest > 1; longest = (longest + 1) / 2) {
    count = halve(a, kernels, row, search, count, have_scores, scored);
    have_scores = true;
    std::nth_element(search.groups, search.groups + a.k, search.groups + count, better);
    count = a.k;
  }
  for (int64_t g = 0; g < count; ++g) blocks[search.groups[g].begin] = 1;
}

void search_unit(const HipSearchArgs& a, const BlockScoresKernels& kernels, const Search& search,
                 int64_t unit) {
  const int64_t r = unit % a.max_rows;
  const int64_t head = unit / a.max_rows % a.heads;
  const int64_t s = unit / a.max_rows / a.heads;
  const int64_t sq = a.queries.size(s);
  uint8_t* blocks = a.blocks + unit * a.max_blocks;
  memset(blocks, 0, size_t(a.max_blocks));
  a.scored[unit] = 0;
  if (r * a.block_m >= sq) return;
  const int64_t size = float_size(a.type);
  const int64_t first = a.keys.size(s) - sq + r * a.block_m;  // position of the row's first query
  // Blocks before the one that its window reaches into.
  const int64_t candidates = std::max<int64_t>(first - a.windows[head] + 1, 0) / a.block_n;
  const int64_t queries = div_up(std::min(a.block_m, sq - r * a.block_m), a.query_stride);
  const SearchRow row = {static_cast<const uint8_t*>(a.q) +
                             size * (a.queries.begin(s, a.q_stride_b, a.q_stride_token) +
                                     head * a.q_stride_head + r * a.block_m * a.q_stride_token),
                         a.sampled + (s * a.kv_heads + head / (a.heads / a.kv_heads)) *
                                         a.max_blocks * sampled_keys(a) * a.d,
                         queries, round_up(queries, kWidest), search.packed};
  search_row(a, kernels, row, search, candidates, blocks, a.scored + unit);
}

}  // namespace

void block_means(const BlockMeansArgs& args, Isa isa, const Parallel& parallel) {
  const BlockScoresKernels& kernels = *pick(kTable, isa, 0, args.block).fn;
  const int64_t units = args.tokens.count * args.heads * args.max_blocks;
  const int64_t tasks = std::min(parallel.threads, units);
  parallel.for_each(
      tasks, [&](int64_t i) { kernels.means(args, units * i / tasks, units * (i + 1) / tasks); });
}

int64_t hip_search_samples(const HipSearchArgs& a) {
  return a.keys.count * a.kv_heads * a.max_blocks * sampled_keys(a) * a.d;
}

int64_t hip_search_scratch(const HipSearchArgs& args, const Parallel& parallel) {
  return tasks_of(args, parallel) * bytes_of_task(args);
}

void hip_search(const HipSearchArgs& args, Isa isa, const Parallel& parallel) {
  const BlockScoresKernels& kernels = *pick(kTable, isa, 0, args.block_m).fn;
  const int64_t blocks = args.keys.count * args.kv_heads * args.max_blocks;
  const int64_t pieces = std::min(parallel.threads, blocks);
  parallel.for_each(pieces, [&](int64_t i) {
    kernels.sample(args, blocks * i / pieces, blocks * (i + 1) / pieces);
  });
  const int64_t units = args.queries.count * args.heads * args.max_rows;
  const int64_t tasks = tasks_of(args, parallel);
  parallel.for_each(tasks, [&](int64_t task) {
    const Search search = scratch_of(args, args.scratch + task * bytes_of_task(args));
    // Later rows have more to search, so tasks take turns.
    for (int64_t unit = task; unit < units; unit += tasks) {
      search_unit(args, kernels, search, unit);
    }
  });
}

}  // namespace ow
