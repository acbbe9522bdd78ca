// Scores and sums of values of simd/attention.h for bf16 keys and values and up to 16 rows, by tile
// products.
//
//   scores   keys are read where they lie, 16 of them against 16 rows of q that were packed into
//            lines once; sums come out as [key][row] and are transposed.
//   values   Weights are split into three bf16 parts, which keep 24 bits of them, and are the
//   tile's
//            rows. Values need pairs of tokens in a lane: two rows of 32 dimensions are interleaved
//            by unpacking, which mixes the dimensions by a fixed permutation; the sums are put
//            back.
#pragma once

#include "simd/attention.h"
#include "simd/tiles.h"

namespace ow::OW_TARGET {
namespace {

// A product takes 32 dimensions of keys, or 32 tokens of values.
constexpr int64_t kDepth = 32;
constexpr int64_t kParts = 3;
// Dimensions of values whose lines and sums are held together.
constexpr int64_t kValueBlock = 64;

OW_INLINE __mmask32 bf16_mask(int64_t n) {
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1;
}

// 32 elements of a row, zero past n.
OW_INLINE __m512i load_bf16(const bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(bf16_mask(n), p);
}

// Rows of q as lines: [d / 32, 16 pairs of dimensions, 16 rows, 2].
template <int64_t kMaxD>
class PackedQueries {
 public:
  template <class RowOf>
  void pack(int64_t rows, int64_t d, const RowOf& row_of) {
    for (int64_t i = 0; i < d; i += kDepth) {
      VecF pairs[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) {
        const __m512i row = r < rows ? load_bf16(row_of(r) + i, d - i) : _mm512_setzero_si512();
        pairs[r] = as_float(VecI{row});
      }
      transpose(pairs);
      for (int64_t l = 0; l < kTileRows; ++l) {
        _mm512_store_si512(lines_[i / kDepth][l], as_int(pairs[l]).v);
      }
    }
  }
  const void* depth(int64_t i) const { return lines_[i / kDepth]; }

 private:
  alignas(64) uint8_t lines_[kMaxD / kDepth][kTileRows][64];
};

// Where 16 keys can be read as tiles: in place, or a copy of those of the last 32 dimensions or the
// last keys, zero past the end.
class KeyTiles {
 public:
  KeyTiles(const bf16* keys, int64_t stride, int64_t count, int64_t d)
      : keys_(keys), stride_(stride), count_(count), d_(d) {}

  template <int kT>
  void load(int64_t i) {
    if (count_ >= kTileRows && i + kDepth <= d_) {
      return load_tile<kT>(keys_ + i, stride_ * int64_t(sizeof(bf16)));
    }
    for (int64_t j = 0; j < kTileRows; ++j) {
      const int64_t some = j < count_ ? d_ - i : 0;
      _mm512_store_si512(copy_[j], load_bf16(keys_ + (some > 0 ? j * stride_ + i : 0), some));
    }
    load_tile<kT>(copy_, 64);
  }

 private:
  const bf16* keys_;
  int64_t stride_, count_, d_;
  alignas(64) uint8_t copy_[kTileRows][64];
};

// scores[r][j] = scale * q_r . key_j. Two blocks of 16 keys at a time: their products need not wait
// for each other.
template <int64_t kMaxD, class Fetch>
void score_keys_bf16(const PackedQueries<kMaxD>& q, int64_t rows, const bf16* keys, int64_t stride,
                     int64_t count, int64_t d, float scale, float* scores, int64_t scores_stride,
                     const Fetch& ahead) {
  alignas(64) float sums[2][kTileRows][kTileRows];
  for (int64_t begin = 0; begin < count; begin += 2 * kTileRows) {
    KeyTiles first(keys + begin * stride, stride, count - begin, d);
    const int64_t rest = count - begin - kTileRows;
    KeyTiles second(keys + (rest > 0 ? begin + kTileRows : begin) * stride, stride, rest, d);
    zero_tile<0>();
    zero_tile<1>();
    for (int64_t i = 0; i < d; i += kDepth) {
      load_tile<4>(q.depth(i), 64);
      first.load<2>(i);
      multiply_bf16<0, 2, 4>();
      if (rest > 0) {
        second.load<3>(i);
        multiply_bf16<1, 3, 4>();
      }
    }
    for (int64_t j = begin; j < begin + 2 * kTileRows; ++j) ahead.fetch(j);
    store_tile<0>(sums[0], 64);
    store_tile<1>(sums[1], 64);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = begin + half * kTileRows;
      if (at >= count) break;
      VecF columns[kTileRows];
      for (int64_t j = 0; j < kTileRows; ++j) columns[j] = load(sums[half][j]);
      transpose(columns);
      for (int64_t r = 0; r < rows; ++r) {
        store_n(scores + r * scores_stride + at, mul(columns[r], set1(scale)), count - at);
      }
    }
  }
}

// The weights of up to 16 rows and kMaxCount tokens in three parts, largest first: tile row 3 r + p
// is part p of row r. Zero past the last token.
template <int64_t kMaxCount>
class WeightParts {
 public:
  WeightParts(const float* weights, int64_t stride, int64_t rows, int64_t count) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < round_up(count, kDepth); j += kLanes) {
        VecF rest = count > j ? load_n(weights + r * stride + j, count - j) : set1(0.0f);
        for (int64_t p = 0; p < kParts; ++p) {
          const __m256i part = __m256i(_mm512_cvtneps_pbh(rest.v));
          _mm256_store_si256(reinterpret_cast<__m256i*>(parts_[kParts * r + p] + j), part);
          rest = sub(rest, widen_bf16(part));
        }
      }
    }
    // What else a tile holds is multiplied too.
    for (int64_t t = kParts * rows; t < round_up(kParts * rows, kTileRows); ++t) {
      memset(parts_[t], 0, size_t(round_up(count, kDepth)) * sizeof(bf16));
    }
  }
  const void* tile(int64_t t, int64_t token) const { return parts_[t * kTileRows] + token; }
  static constexpr int64_t kStride = kMaxCount * int64_t(sizeof(bf16));

 private:
  alignas(64) bf16 parts_[kParts * kTileRows][kMaxCount];
};

// Pairs of tokens of up to 64 dimensions as lines: [count / 32, 4, 16 pairs, 16 dimensions, 2],
// zero past the last token and dimension.
template <int64_t kMaxCount>
class ValueLines {
 public:
  template <class Fetch>
  void fill(const bf16* values, int64_t stride, int64_t count, int64_t size, const Fetch& ahead) {
    const int64_t whole = size == kValueBlock ? count / 2 * 2 : 0;
    for (int64_t j = 0; j < whole; j += 2) {
      put(j, values + j * stride, values + (j + 1) * stride,
          [](const bf16* p, int64_t i) { return _mm512_loadu_si512(p + i); });
      ahead.fetch(j), ahead.fetch(j + 1);
    }
    for (int64_t j = whole; j < round_up(count, kDepth); j += 2) {
      const auto row = [&](int64_t token) {
        return token < count ? values + token * stride : nullptr;
      };
      put(j, row(j), row(j + 1), [size](const bf16* p, int64_t i) {
        return p == nullptr ? _mm512_setzero_si512() : load_bf16(p + (i < size ? i : 0), size - i);
      });
    }
  }
  const void* tile(int64_t token, int64_t block) const { return lines_[token / kDepth][block]; }

 private:
  template <class Load>
  void put(int64_t j, const bf16* first, const bf16* second, const Load& load_at) {
    uint8_t(*lines)[kTileRows][64] = lines_[j / kDepth];
#pragma GCC unroll 2
    for (int64_t i = 0; i < kValueBlock / kDepth; ++i) {
      const __m512i a = load_at(first, i * kDepth);
      const __m512i b = load_at(second, i * kDepth);
      _mm512_store_si512(lines[2 * i][j % kDepth / 2], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(lines[2 * i + 1][j % kDepth / 2], _mm512_unpackhi_epi16(a, b));
    }
  }

  alignas(64) uint8_t lines_[kMaxCount / kDepth][kValueBlock / kTileRows][kTileRows][64];
};

// out[r][i] += sum_j weights[r][j] * value_j[i]
template <int64_t kMaxCount, class Fetch>
void sum_values_bf16(const float* weights, int64_t weights_stride, int64_t rows, const bf16* values,
                     int64_t stride, int64_t count, int64_t d, float* out, int64_t out_stride,
                     const Fetch& ahead) {
  constexpr int64_t kBlocks = kValueBlock / kTileRows;
  const WeightParts<kMaxCount> parts(weights, weights_stride, rows, count);
  const int64_t tiles = div_up(kParts * rows, kTileRows);
  ValueLines<kMaxCount> lines;
  alignas(64) float sums[kParts * kTileRows][kBlocks][kTileRows];
  for (int64_t begin = 0; begin < d; begin += kValueBlock) {
    const int64_t size = min_of(kValueBlock, d - begin);
    if (begin == 0) {
      lines.fill(values + begin, stride, count, size, ahead);
    } else {
      lines.fill(values + begin, stride, count, size, Ahead{});
    }
    for (int64_t t = 0; t < tiles; ++t) {
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      for (int64_t j = 0; j < count; j += kDepth) {
        load_tile<4>(parts.tile(t, j), parts.kStride);
        load_tile<5>(lines.tile(j, 0), 64);
        multiply_bf16<0, 4, 5>();
        load_tile<6>(lines.tile(j, 1), 64);
        multiply_bf16<1, 4, 6>();
        if (size <= kDepth) continue;
        load_tile<5>(lines.tile(j, 2), 64);
        multiply_bf16<2, 4, 5>();
        load_tile<6>(lines.tile(j, 3), 64);
        multiply_bf16<3, 4, 6>();
      }
      float* to = sums[t * kTileRows][0];
      constexpr int64_t kBytes = kValueBlock * int64_t(sizeof(float));
      store_tile<0>(to, kBytes), store_tile<1>(to + 16, kBytes);
      store_tile<2>(to + 32, kBytes), store_tile<3>(to + 48, kBytes);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < size; i += kDepth) {
        const auto sum_of = [&](int64_t block) __attribute__((always_inline)) {
          VecF sum = load(sums[kParts * r + 2][block]);
          sum = add(sum, load(sums[kParts * r + 1][block]));
          return add(sum, load(sums[kParts * r][block]));
        };
        const VecF low = sum_of(i / kTileRows);
        const VecF high = sum_of(i / kTileRows + 1);
        // Of each 8 dimensions the first four are in `low`.
        const auto join = [&](auto four) __attribute__((always_inline)) {
          const __m512 mixed = four(low.v, high.v);
          return VecF{_mm512_shuffle_f32x4(mixed, mixed, 0xd8)};
        };
        const auto add_to = [&](float* to, VecF sum, int64_t lanes) __attribute__((always_inline)) {
          store_n(to, add(load_n(to, lanes), sum), lanes);
        };
        float* to = out + r * out_stride + begin + i;
        const VecF first =
            join([](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x44); });
        add_to(to, first, size - i);
        if (size - i <= kLanes) continue;
        const VecF second =
            join([](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0xee); });
        add_to(to + kLanes, second, size - i - kLanes);
      }
    }
  }
}

}  // namespace
}  // namespace ow::OW_TARGET
