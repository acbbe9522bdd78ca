#include "kernels/block_index/block_index.h"

#include <algorithm>

namespace ow {
namespace {

// Of one head and sequence.
struct Marks {
  const uint8_t* blocks;
  const uint8_t* columns;
  const int32_t* columns_before;
  const int32_t* slashes_before;
};

Marks marks_of(const BlockIndexArgs& a, int64_t unit) {
  const int64_t at = unit * (a.max_keys + 1);
  return {a.blocks == nullptr ? nullptr : a.blocks + unit * a.max_rows * a.max_blocks,
          a.columns == nullptr ? nullptr : a.columns + unit * a.max_keys,
          a.columns == nullptr ? nullptr : a.column_counts + at,
          a.slashes == nullptr ? nullptr : a.slash_counts + at};
}

void count_marks(const uint8_t* marks, int64_t n, int32_t* before) {
  before[0] = 0;
  for (int64_t i = 0; i < n; ++i) before[i + 1] = before[i] + (marks[i] != 0);
}

// Positions of a row's queries, and the keys that its last one may see.
struct Row {
  int64_t first, last, visible;
};

Row row_at(const BlockIndexArgs& a, int64_t s, int64_t r) {
  const int64_t sq = a.queries.size(s);
  const int64_t shift = a.keys.size(s) - sq;
  const int64_t last = shift + std::min(sq, (r + 1) * a.block_m) - 1;
  const int64_t visible = a.causal ? std::max<int64_t>(last + 1, 0) : a.keys.size(s);
  return {std::max<int64_t>(shift + r * a.block_m, 0), last, visible};
}

bool lists_block(const BlockIndexArgs& a, const Marks& marks, int64_t head, const Row& row,
                 int64_t r, int64_t c, int64_t key_count) {
  const int64_t begin = c * a.block_n;
  const int64_t end = std::min(begin + a.block_n, key_count);
  if (begin < a.sinks[head]) return true;
  // Distances between the row's queries and the block's keys are `nearest` .. `farthest`, all.
  const int64_t nearest = std::max<int64_t>(row.first - (end - 1), 0);
  const int64_t farthest = row.last - begin;
  const bool seen = farthest >= 0;
  if (seen && nearest < a.windows[head]) return true;
  if (marks.blocks != nullptr && marks.blocks[r * a.max_blocks + c] != 0) return true;
  if (seen && marks.slashes_before != nullptr &&
      marks.slashes_before[farthest + 1] != marks.slashes_before[nearest]) {
    return true;
  }
  return marks.columns_before != nullptr &&
         marks.columns_before[end] - marks.columns_before[begin] == end - begin;
}

// Calls visit(head, row of all sequences, marks, row, r, keys of the sequence) for every row.
template <class Visit>
void for_each_row(const BlockIndexArgs& a, const Parallel& parallel, const Visit& visit) {
  const int64_t units = a.queries.count * a.heads;
  const int64_t tasks = std::min(parallel.threads, units);
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t end = units * (task + 1) / tasks;
    for (int64_t unit = units * task / tasks; unit < end; ++unit) {
      const int64_t s = unit / a.heads;
      const int64_t key_count = a.keys.size(s);
      const Marks marks = marks_of(a, unit);
      if (a.columns != nullptr) {
        count_marks(marks.columns, key_count, a.column_counts + unit * (a.max_keys + 1));
      }
      if (a.slashes != nullptr) {
        count_marks(a.slashes + unit * a.max_keys, key_count,
                    a.slash_counts + unit * (a.max_keys + 1));
      }
      int64_t before = 0;
      for (int64_t t = 0; t < s; ++t) before += div_up(a.queries.size(t), a.block_m);
      const int64_t rows = div_up(a.queries.size(s), a.block_m);
      for (int64_t r = 0; r < rows; ++r) {
        visit(unit % a.heads, before + r, marks, row_at(a, s, r), r, key_count);
      }
    }
  });
}

// What a row lists: calls block(c) in order and keys(begin, end), ranges of keys of other blocks.
template <class Block, class Keys>
void walk_row(const BlockIndexArgs& a, const Marks& marks, int64_t head, const Row& row, int64_t r,
              int64_t key_count, const Block& block, const Keys& keys) {
  for (int64_t c = 0; c < div_up(row.visible, a.block_n); ++c) {
    if (lists_block(a, marks, head, row, r, c, key_count)) {
      block(c);
    } else if (marks.columns != nullptr) {
      keys(c * a.block_n, std::min((c + 1) * a.block_n, row.visible));
    }
  }
}

// Radix selection: the scores' bits, ordered, are narrowed to those of the smallest chosen score,
// eight at a time, so no score moves and a row takes four passes whatever it holds.
constexpr int kRadixBits = 8;
constexpr int kBuckets = 1 << kRadixBits;

constexpr uint32_t kMinusInfinity = 0x007fffff;  // ordered(-inf)

// The order of floats as that of unsigned numbers; NaN is the largest.
uint32_t ordered(float value) {
  if (value != value) return UINT32_MAX;
  const uint32_t bits = float_to_bits(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

double weight_of(const LargestArgs& a, float score) {
  if (ordered(score) <= kMinusInfinity) return 0.0;
  return a.by_mass ? (score < 0.0f ? 0.0 : double(score)) : 1.0;
}

void mark_largest(const LargestArgs& a, int64_t row) {
  const float* scores = a.scores + row * a.n;
  uint8_t* marks = a.marks + row * a.n;
  double total = 0.0;
  for (int64_t i = 0; i < a.n; ++i) total += weight_of(a, scores[i]);
  double missing = a.budgets[row];
  if (!(total > missing)) {
    for (int64_t i = 0; i < a.n; ++i) marks[i] = ordered(scores[i]) > kMinusInfinity;
    return;
  }
  uint32_t smallest = 0;  // of the chosen: its bits so far
  bool all_of_it = false;
  for (int shift = 32 - kRadixBits; shift >= 0 && !all_of_it; shift -= kRadixBits) {
    double sums[kBuckets] = {};
    int32_t counts[kBuckets] = {};
    for (int64_t i = 0; i < a.n; ++i) {
      const uint32_t key = ordered(scores[i]);
      const bool among = shift == 32 - kRadixBits || (key ^ smallest) >> (shift + kRadixBits) == 0;
      if (!among) continue;
      const int bucket = (key >> shift) & (kBuckets - 1);
      sums[bucket] += weight_of(a, scores[i]);
      ++counts[bucket];
    }
    int bucket = kBuckets - 1;
    while (bucket > 0 && sums[bucket] < missing) missing -= sums[bucket--];
    smallest |= uint32_t(bucket) << shift;
    all_of_it = missing > 0.0 && (counts[bucket] == 1 || (!a.by_mass && sums[bucket] == missing));
  }
  // Equal scores are told apart by their place, unless all that begin with these bits are chosen.
  for (int64_t i = 0; i < a.n; ++i) {
    const uint32_t key = ordered(scores[i]);
    const bool last = key == smallest && missing > 0.0;
    if (last) missing -= weight_of(a, scores[i]);
    const bool chosen = all_of_it ? key >= smallest : key > smallest || last;
    marks[i] = chosen && key > kMinusInfinity;
  }
}

}  // namespace

int64_t block_index_scratch(const BlockIndexArgs& a) {
  return a.queries.count * a.heads * (a.max_keys + 1);
}

void count_lists(const BlockIndexArgs& a, int32_t* block_counts, int32_t* column_counts,
                 const Parallel& parallel) {
  for_each_row(a, parallel,
               [&](int64_t head, int64_t at, const Marks& marks, const Row& row, int64_t r,
                   int64_t key_count) {
                 int32_t blocks = 0;
                 int32_t columns = 0;
                 walk_row(
                     a, marks, head, row, r, key_count, [&](int64_t) { ++blocks; },
                     [&](int64_t begin, int64_t end) {
                       columns += marks.columns_before[end] - marks.columns_before[begin];
                     });
                 block_counts[head * a.rows + at] = blocks;
                 column_counts[head * a.rows + at] = columns;
               });
}

void fill_lists(const BlockIndexArgs& a, const int32_t* indptr, const int32_t* column_indptr,
                int32_t* indices, int32_t* columns, const Parallel& parallel) {
  for_each_row(a, parallel,
               [&](int64_t head, int64_t at, const Marks& marks, const Row& row, int64_t r,
                   int64_t key_count) {
                 int32_t* block = indices + indptr[head * (a.rows + 1) + at];
                 int32_t* column = columns + column_indptr[head * (a.rows + 1) + at];
                 walk_row(
                     a, marks, head, row, r, key_count, [&](int64_t c) { *block++ = int32_t(c); },
                     [&](int64_t begin, int64_t end) {
                       if (marks.columns_before[end] == marks.columns_before[begin]) return;
                       for (int64_t j = begin; j < end; ++j) {
                         if (marks.columns[j] != 0) *column++ = int32_t(j);
                       }
                     });
               });
}

void largest_elements(const LargestArgs& a, const Parallel& parallel) {
  const int64_t tasks = std::min(parallel.threads, a.rows);
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t end = a.rows * (task + 1) / tasks;
    for (int64_t row = a.rows * task / tasks; row < end; ++row) mark_largest(a, row);
  });
}

}  // namespace ow
