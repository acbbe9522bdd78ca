// Lists of an index, and the selection of the largest scores.
#include <algorithm>

#include "kernels/block_index/block_index.h"
#include "smoke.h"

namespace ow::testing {
namespace {

// Offsets of sequences of queries and of keys, and marks of which `eighths` are set.
struct Problem {
  BlockIndexArgs args{};
  std::vector<int32_t> q_offsets{0}, k_offsets{0}, windows, sinks;
  Bytes blocks, columns, slashes;

  Problem(const std::vector<int>& q_lengths, const std::vector<int>& k_lengths, int64_t block_m,
          int64_t block_n, int64_t eighths, bool causal) {
    args.heads = 2;
    args.causal = causal;
    args.block_m = block_m;
    args.block_n = block_n;
    for (size_t s = 0; s < q_lengths.size(); ++s) {
      q_offsets.push_back(q_offsets.back() + q_lengths[s]);
      k_offsets.push_back(k_offsets.back() + k_lengths[s]);
      args.rows += div_up(q_lengths[s], block_m);
      args.max_rows = std::max(args.max_rows, div_up(q_lengths[s], block_m));
      args.max_keys = std::max(args.max_keys, int64_t(k_lengths[s]));
    }
    args.max_blocks = div_up(args.max_keys, block_n);
    const int64_t units = int64_t(q_lengths.size()) * args.heads;
    const auto marks = [&](int64_t count) {
      Bytes bytes;
      for (int64_t i = 0; i < count; ++i) bytes.push_back(rng.below(8) < eighths);
      return bytes;
    };
    blocks = marks(units * args.max_rows * args.max_blocks);
    columns = marks(units * args.max_keys);
    slashes = marks(units * args.max_keys);
    windows = {1, 40};
    sinks = {0, 20};
  }

  BlockIndexArgs in(Guarded* memory) const {
    BlockIndexArgs a = args;
    const int64_t count = int64_t(q_offsets.size()) - 1;
    a.queries = {memory->copy(q_offsets), count, 0};
    a.keys = {memory->copy(k_offsets), count, 0};
    a.blocks = memory->copy(blocks);
    a.columns = memory->copy(columns);
    a.slashes = memory->copy(slashes);
    a.windows = memory->copy(windows);
    a.sinks = memory->copy(sinks);
    a.column_counts = memory->empty<int32_t>(size_t(block_index_scratch(a)));
    a.slash_counts = memory->empty<int32_t>(size_t(block_index_scratch(a)));
    return a;
  }
};

std::vector<int32_t> offsets_of(const BlockIndexArgs& a, const int32_t* counts) {
  std::vector<int32_t> indptr;
  int32_t total = 0;
  for (int64_t head = 0; head < a.heads; ++head) {
    indptr.push_back(total);
    for (int64_t r = 0; r < a.rows; ++r) indptr.push_back(total += *counts++);
  }
  return indptr;
}

// Items of every row increase and stay below `limit`.
bool sorted_below(const std::vector<int32_t>& indptr, const int32_t* items, int64_t limit) {
  for (size_t r = 0; r + 1 < indptr.size(); ++r) {
    for (int32_t i = indptr[r]; i < indptr[r + 1]; ++i) {
      if (items[i] < 0 || items[i] >= limit) return false;
      if (i > indptr[r] && items[i] <= items[i - 1]) return false;
    }
  }
  return true;
}

void check_lists(const Problem& p, Guarded* memory) {
  running = "block_index";
  std::vector<int32_t> first;
  for (const int64_t threads : {1, 3}) {
    for (const Against side : kSides) {
      memory->restart(side);
      const BlockIndexArgs a = p.in(memory);
      const Parallel parallel = threads == 1 ? serial_parallel() : reversed_parallel(threads);
      const size_t lists = size_t(a.heads * a.rows);
      // Counts lie outside of the guarded memory, whose regions the lists need.
      std::vector<int32_t> blocks(lists), columns(lists);
      count_lists(a, blocks.data(), columns.data(), parallel);
      const std::vector<int32_t> indptr = offsets_of(a, blocks.data());
      const std::vector<int32_t> column_indptr = offsets_of(a, columns.data());
      int32_t* indices = memory->empty<int32_t>(size_t(indptr.back()));
      int32_t* singles = memory->empty<int32_t>(size_t(column_indptr.back()));
      fill_lists(a, indptr.data(), column_indptr.data(), indices, singles, parallel);
      CHECK(sorted_below(indptr, indices, a.max_blocks), "block_index: blocks out of order");
      CHECK(sorted_below(column_indptr, singles, a.max_keys), "block_index: columns out of order");
      CHECK(memory->intact(), "block_index: wrote outside of the lists");
      std::vector<int32_t> all(indices, indices + indptr.back());
      all.insert(all.end(), singles, singles + column_indptr.back());
      if (first.empty()) first = all;
      CHECK(all == first, "block_index: depends on %d threads", int(threads));
    }
  }
}

void check_largest(int64_t n, bool by_mass, Guarded* memory) {
  running = "largest_elements";
  constexpr int64_t kRows = 5;
  std::vector<float> scores;
  for (int64_t i = 0; i < kRows * n; ++i) scores.push_back(float(rng.below(64)) / 8);
  const std::vector<float> budgets = {0.0f, 1.0f, 2.5f, float(n) / 2, 1e30f};
  for (const Against side : kSides) {
    memory->restart(side);
    const LargestArgs a{kRows,
                        n,
                        by_mass,
                        memory->copy(scores),
                        memory->copy(budgets),
                        memory->empty<uint8_t>(size_t(kRows * n))};
    largest_elements(a, reversed_parallel(2));
    for (int64_t row = 0; row < kRows; ++row) {
      float least = 1e30f, most = -1.0f;
      double sum = 0.0, smallest = 1e30;
      for (int64_t i = 0; i < n; ++i) {
        const float score = scores[size_t(row * n + i)];
        const double weight = by_mass ? double(score) : 1.0;
        if (a.marks[row * n + i] != 0) {
          least = std::min(least, score);
          smallest = std::min(smallest, weight);
          sum += weight;
        } else {
          most = std::max(most, score);
        }
      }
      CHECK(most <= least, "largest: a larger score is left out");
      const double budget = budgets[size_t(row)];
      CHECK(most < 0.0f || sum >= budget, "largest: %g of %g", sum, budget);
      CHECK(sum == 0.0 || most < 0.0f || sum - smallest < budget, "largest: more than needed");
    }
    CHECK(memory->intact(), "largest: wrote outside of the marks");
  }
}

}  // namespace

void check_block_index(Guarded* memory) {
  for (const int64_t eighths : {0, 1, 7}) {
    for (const int64_t block : {16, 48, 128}) {
      for (const bool causal : {true, false}) {
        check_lists(Problem({1}, {1}, block, 16, eighths, causal), memory);
        check_lists(Problem({70, 0, 33}, {90, 7, 20}, 16, block, eighths, causal), memory);
        check_lists(Problem({130}, {130}, block, block, eighths, causal), memory);
      }
    }
  }
  for (const int64_t n : {1, 7, 64, 300}) {
    check_largest(n, false, memory);
    check_largest(n, true, memory);
  }
}

}  // namespace ow::testing
