// One problem of block attention and its formula, for the smoke tests of both directions.
#pragma once

#include <math.h>

#include <algorithm>

#include "kernels/block_attention/block_attention.h"
#include "smoke.h"

namespace ow::testing {

struct AttentionShape {
  int64_t queries, keys, heads, kv_heads, d, dv;
  AttentionMask mask;
  int64_t block_m, block_n;  // 0: no lists
};
constexpr AttentionShape kAttentionShapes[] = {
    {1, 1, 1, 1, 1, 1, {true, 0, 0, 0}, 0, 0},
    {65, 65, 2, 1, 64, 64, {true, 0, 0, 0}, 0, 0},
    {70, 40, 2, 2, 33, 17, {true, 0, 0, 0}, 0, 0},
    {33, 300, 1, 1, 80, 96, {false, 0, 0, 0}, 0, 0},
    {90, 130, 2, 1, 16, 40, {true, 37, 5, 3}, 0, 0},
    {100, 131, 2, 1, 31, 16, {true, 0, 0, 0}, 32, 48},
    {100, 290, 2, 2, 64, 16, {true, 90, 70, 0}, 128, 16},
    {50, 161, 1, 1, 8, 130, {false, 0, 0, 0}, 16, 128},
    {9, 150, 6, 2, 40, 24, {true, 20, 3, 2}, 0, 0},
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
inline void make_lists(const AttentionShape& s, Attention* p) {
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

inline bool listed(const AttentionShape& s, const Attention& p, int64_t head, int64_t i,
                   int64_t j) {
  if (s.block_m == 0) return true;
  const size_t at = size_t(head * (div_up(s.queries, s.block_m) + 1) + i / s.block_m);
  const auto holds = [&](const std::vector<int32_t>& indptr, const std::vector<int32_t>& items,
                         int64_t item) {
    return std::find(items.begin() + indptr[at], items.begin() + indptr[at + 1], item) !=
           items.begin() + indptr[at + 1];
  };
  return holds(p.indptr, p.indices, j / s.block_n) || holds(p.column_indptr, p.columns, j);
}

inline bool visible(const AttentionShape& s, int64_t i, int64_t j) {
  const int64_t distance = s.keys - s.queries + i - j;
  return !s.mask.causal || (distance >= s.mask.min_distance && distance >= 0 &&
                            (s.mask.window == 0 || distance < s.mask.window || j < s.mask.sinks));
}

// Of query i to each key, 0 where it is not seen; `total` is the sum of exponentials.
inline std::vector<double> weights_of(const AttentionShape& s, const Attention& p, int64_t i,
                                      int64_t head, double* total) {
  const FloatType type = p.args.type;
  const int64_t kv_head = head / (s.heads / s.kv_heads);
  std::vector<double> weights(size_t(s.keys), 0.0);
  *total = 0.0;
  for (int64_t j = 0; j < s.keys; ++j) {
    if (!visible(s, i, j) || !listed(s, p, head, i, j)) continue;
    double score = 0.0;
    for (int64_t c = 0; c < s.d; ++c) {
      score += double(read(p.q.data(), type, (i * s.heads + head) * s.d + c)) *
               double(read(p.k.data(), type, (j * s.kv_heads + kv_head) * s.d + c));
    }
    *total += weights[size_t(j)] = exp(double(p.args.scale) * score);
  }
  for (double& weight : weights) weight /= *total > 0.0 ? *total : 1.0;
  return weights;
}

inline void add_formula(const AttentionShape& s, Attention* p, int64_t i, int64_t head) {
  const BlockAttentionArgs& a = p->args;
  const int64_t kv_head = head / (s.heads / s.kv_heads);
  double total = 0.0;
  const std::vector<double> weights = weights_of(s, *p, i, head, &total);
  p->lse.push_back(log(total));
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

inline Attention make_attention(const AttentionShape& s, FloatType type) {
  Attention p;
  BlockAttentionArgs& a = p.args;
  a.heads = s.heads;
  a.kv_heads = a.kv_end = s.kv_heads;
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
inline double weight_error(const BlockAttentionArgs& a, const AttentionShape& s) {
  const double scores = 0x1p-24 * double(a.d + 8) * 4.0 * sqrt(double(a.d));
  const double sums = 0x1p-24 * double(s.keys + 10);
  return scores + sums + (a.type == FloatType::bf16 ? 8e-5 : 0.0);
}

// Tile `first` .. of one head.
inline QueryTile tile_of(const AttentionShape& s, const BlockAttentionArgs& a, int64_t head,
                         int64_t first, int64_t count, float* scores) {
  QueryTile tile{};
  tile.sequence = a.sequences;
  tile.head = head;
  tile.heads = 1;
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

// Calls visit(tile) for all tiles of all heads.
template <class Visit>
void each_tile(const AttentionShape& s, const BlockAttentionArgs& a, float* scores,
               const Visit& visit) {
  const int64_t rows = s.block_m > 0 ? s.block_m : kQueryTile;
  for (int64_t head = 0; head < s.heads; ++head) {
    for (int64_t first = 0; first < s.queries; first += min_of(rows, kQueryTile)) {
      const int64_t in_block = rows - first % rows;
      const int64_t count = min_of(min_of(in_block, kQueryTile), s.queries - first);
      visit(tile_of(s, a, head, first, count, scores));
    }
  }
}

}  // namespace ow::testing
