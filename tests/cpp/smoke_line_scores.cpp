// Line scores, means of blocks and the tree search.
#include <math.h>

#include "kernels/block_scores/block_scores.h"
#include "kernels/line_scores/line_scores.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<LineScoresFn> kLines[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_LINE_SCORES_KERNELS(OW_ROW)
#undef OW_ROW
};

// Sums over keys and queries of float64 softmax, relative to the rounding of scores.
bool lines_right(const LineScoresArgs& a, const Bytes& q, const Bytes& k, const float* columns,
                 const float* diagonals) {
  const int64_t sq = a.queries.length;
  const int64_t sk = a.keys.length;
  const int64_t w = min_of(a.probes, min_of(sq, sk));
  for (int64_t head = 0; head < a.heads; ++head) {
    std::vector<double> column(size_t(sk), 0.0), diagonal(size_t(sk), 0.0);
    for (int64_t i = 0; i < w; ++i) {
      const int64_t p = sk - w + i;
      std::vector<double> weights;
      double sum = 0.0;
      for (int64_t j = 0; j <= p; ++j) {
        double score = 0.0;
        for (int64_t c = 0; c < a.d; ++c) {
          score += double(read(q.data(), a.type, ((sq - w + i) * a.heads + head) * a.d + c)) *
                   double(read(k.data(), a.type, (j * a.kv_heads) * a.d + c));
        }
        weights.push_back(exp(double(a.scale) * score));
        sum += weights.back();
      }
      for (int64_t j = 0; j <= p; ++j) {
        column[size_t(j)] += weights[size_t(j)] / sum;
        diagonal[size_t(p - j)] += weights[size_t(j)] / sum;
      }
    }
    for (int64_t j = 0; j < sk; ++j) {
      const double bound = double(a.d + sk + 80) * 0x1p-23;
      const float c = columns[head * a.max_keys + j];
      const float t = diagonals[head * a.max_keys + j];
      if (!(fabs(c - column[size_t(j)]) <= bound * column[size_t(j)] + 1e-34)) return false;
      if (!(fabs(t - diagonal[size_t(j)]) <= bound * diagonal[size_t(j)] + 1e-34)) return false;
    }
  }
  return true;
}

void check_lines(int64_t sq, int64_t sk, int64_t d, int64_t probes, Guarded* memory) {
  for (const auto& entry : kLines) {
    if (entry.isa > detected_isa()) continue;
    LineScoresArgs a{};
    a.heads = 2;
    a.kv_heads = 1;
    a.d = d;
    a.probes = probes;
    a.queries = {nullptr, 1, sq};
    a.keys = {nullptr, 1, sk};
    a.type = FloatType(entry.key);
    a.scale = 0.5f / float(d);
    a.max_keys = sk;
    const Bytes q = floats(sq * 2 * d, a.type, 1.0f);
    const Bytes k = floats(sk * d, a.type, 1.0f);
    a.q_strides = {sq * 2 * d, 2 * d, d};
    a.k_strides = {sk * d, d, d};
    running = entry.name;
    for (const Against side : kSides) {
      memory->restart(side);
      a.q = memory->copy(q);
      a.k = memory->copy(k);
      a.columns = memory->empty<float>(size_t(2 * sk));
      a.diagonals = memory->empty<float>(size_t(2 * sk));
      float* scratch = memory->empty<float>(size_t(scratch_of_task(a)));
      entry.fn(a, scratch, 0, 2);
      CHECK(lines_right(a, q, k, a.columns, a.diagonals), "%s: sq %d, sk %d, d %d differs",
            entry.name, int(sq), int(sk), int(d));
      CHECK(memory->intact(), "%s: wrote outside of its results", entry.name);
    }
  }
}

void check_means(int64_t n, int64_t d, int64_t block, FloatType type, Guarded* memory) {
  const Bytes x = floats(n * 2 * d, type, 1.0f);
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    running = "block_means";
    for (const Against side : kSides) {
      memory->restart(side);
      BlockMeansArgs a{};
      a.heads = 2;
      a.d = d;
      a.block = block;
      a.max_blocks = div_up(n, block);
      a.tokens = {nullptr, 1, n};
      a.type = type;
      a.x = memory->copy(x);
      a.stride_b = n * 2 * d;
      a.stride_token = 2 * d;
      a.stride_head = d;
      a.means = memory->empty<float>(size_t(2 * a.max_blocks * d));
      block_means(a, Isa(tier), reversed_parallel(3));
      for (int64_t i = 0; i < 2 * a.max_blocks * d; ++i) {
        const int64_t c = i / d % a.max_blocks;
        double sum = 0.0, size = 0.0;
        const int64_t end = min_of((c + 1) * block, n);
        for (int64_t t = c * block; t < end; ++t) {
          const double value =
              double(read(x.data(), type, (t * 2 + i / d / a.max_blocks) * d + i % d));
          sum += value;
          size += fabs(value);
        }
        const double tokens = double(end - c * block);
        CHECK(fabs(a.means[i] - sum / tokens) <= (tokens + 2) * 0x1p-24 * size / tokens,
              "block_means: %s, n %d, d %d differs", isa_name(Isa(tier)), int(n), int(d));
      }
      CHECK(memory->intact(), "block_means: wrote outside of the means");
    }
  }
}

// Small integers score exactly, so every tier and thread count must choose the same blocks.
void check_search(int64_t sq, int64_t sk, int64_t d, int64_t top, Guarded* memory) {
  std::vector<float> q, k;
  for (int64_t i = 0; i < sq * 2 * d; ++i) q.push_back(float(rng.below(7) - 3));
  for (int64_t i = 0; i < sk * d; ++i) k.push_back(float(rng.below(7) - 3));
  HipSearchArgs a{};
  a.heads = 2;
  a.kv_heads = 1;
  a.d = d;
  a.block_m = 32;
  a.block_n = 16;
  a.k = top;
  a.query_stride = 3;
  a.key_stride = 5;
  a.max_rows = div_up(sq, a.block_m);
  a.max_blocks = div_up(sk, a.block_n);
  a.queries = {nullptr, 1, sq};
  a.keys = {nullptr, 1, sk};
  a.type = FloatType::f32;
  a.sign = 1.0f;
  a.q_stride_token = 2 * d;
  a.q_stride_head = d;
  a.k_stride_token = d;
  Bytes first;
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    running = "hip_search";
    for (const Against side : kSides) {
      memory->restart(side);
      a.q = memory->copy(q);
      a.k_data = memory->copy(k);
      a.windows = memory->copy(std::vector<int32_t>{1, 20});
      const size_t marks = size_t(2 * a.max_rows * a.max_blocks);
      a.blocks = memory->empty<uint8_t>(marks);
      a.scored = memory->empty<int32_t>(size_t(2 * a.max_rows));
      const Parallel parallel = reversed_parallel(1 + tier);
      a.sampled = memory->empty<float>(size_t(hip_search_samples(a)));
      a.scratch = memory->empty<uint8_t>(size_t(hip_search_scratch(a, parallel)));
      hip_search(a, Isa(tier), parallel);
      const Bytes chosen(a.blocks, a.blocks + marks);
      if (first.empty()) first = chosen;
      CHECK(chosen == first, "hip_search: %s chooses other blocks", isa_name(Isa(tier)));
      CHECK(memory->intact(), "hip_search: wrote outside of the marks");
    }
  }
}

}  // namespace

void check_line_scores(Guarded* memory) {
  check_lines(1, 1, 1, 1, memory);
  check_lines(5, 40, 32, 64, memory);
  check_lines(70, 150, 33, 66, memory);
  check_lines(20, 9, 64, 16, memory);
  for (const FloatType type : kTypes) {
    check_means(1, 1, 1, type, memory);
    check_means(50, 67, 16, type, memory);
  }
  check_search(1, 1, 1, 1, memory);
  check_search(70, 200, 17, 3, memory);
  check_search(100, 90, 32, 2, memory);
}

}  // namespace ow::testing
