// int8 rows of x, any pattern and any group. x is transposed to panels of 16 tokens of 16 bits. Two
// stored weights of an output, next to each other in its order, meet two panel rows at once:
// vpmaddwd multiplies and adds them in pairs, exactly.
//
//   rows of slots s, s + 1    a0 a1 a2 ...   b0 b1 b2 ...    interleaved  a0 b0 a1 b1 ...
//   sums                      a0 w[s] + b0 w[s + 1], a1 w[s] + b1 w[s + 1], ...
//
// Tiers above use it for the patterns whose lines of four slots their own kernels cannot take.
#include <immintrin.h>

#include "kernels/nm_gemm/nm_gemm_body.h"

namespace ow {
namespace avx2 {
namespace {

constexpr int64_t kTokens = 16;
// Vectors of 16 tokens that share a decoded unit: 8 of 16 registers hold their sums.
constexpr int64_t kMaxVectors = 4;
constexpr int64_t kWidth = kMaxVectors * kTokens;

// --- x -------------------------------------------------------------------------------------------

OW_INLINE int64_t token_vectors(const NmGemmArgs& a) { return div_up(a.m, kTokens); }
// Elements of the panel [columns, 16] of a vector of tokens.
OW_INLINE int64_t panel_size(const NmGemmArgs& a) { return nm_columns(a) * kTokens; }

int64_t laid_token_bytes(const NmGemmArgs& a) {
  return token_vectors(a) * panel_size(a) * int64_t(sizeof(int16_t));
}

void lay_out_tokens(const NmGemmArgs& a, int64_t begin, int64_t end) {
  for (int64_t vector = begin; vector < end; ++vector) {
    int16_t* out = static_cast<int16_t*>(a.laid) + vector * panel_size(a);
    memset(out, 0, size_t(panel_size(a)) * sizeof(int16_t));
    const int64_t first = vector * kTokens;
    for (int64_t t = 0; t < min_of(kTokens, a.m - first); ++t) {
      const int8_t* x = static_cast<const int8_t*>(a.x) + (first + t) * a.k;
      for (int64_t k = 0; k < a.k; ++k) out[k * kTokens + t] = x[k];
    }
  }
}

// --- weights -------------------------------------------------------------------------------------

// A unit, unpacked.
struct Unit {
  alignas(64) uint32_t columns[kNmUnit][kNmPanel];
  // The codes of slots s (low half) and s + 1 (high half, 0 past the unit).
  alignas(64) uint32_t pairs[kNmUnit][kNmPanel];
};

template <int kBits, int kBlock>
void decode_unit(const NmGemmArgs& a, int64_t panel, int64_t unit, Unit* out) {
  const IndexLines lines(nm_unit_index(a, panel, unit), nm_index_bits(kBlock),
                         nm_index_lanes(a.vector));
  const uint8_t* values = nm_unit_values(a, panel, unit);
  const int64_t slot = unit * kNmUnit;
  int64_t column = slot / a.kept * kBlock;
  int64_t left = a.kept - slot % a.kept;
  alignas(64) uint32_t codes[kNmUnit + 1][kNmPanel];
  for (int64_t s = 0; s < kNmUnit; ++s) {
    decode_columns<kBlock>(lines, uint32_t(s), uint32_t(column), 1, out->columns[s]);
    uint32_t words[kNmPanel];
    memcpy(words, values + s * kBits / 32 * 64, 64);
    // The code to the top of the word, and down again with its sign.
    const int up = 32 - kBits - int(s % 4 * 8 + (kBits == 4 ? s / 4 % 2 * 4 : 0));
    for (int i = 0; i < kNmPanel; ++i) {
      codes[s][i] = uint32_t(int32_t(words[i] << up) >> (32 - kBits));
    }
    if (--left == 0) {
      left = a.kept;
      column += kBlock;
    }
  }
  memset(codes[kNmUnit], 0, sizeof(codes[kNmUnit]));
  for (int64_t s = 0; s < kNmUnit; ++s) {
    for (int i = 0; i < kNmPanel; ++i) {
      out->pairs[s][i] = (codes[s][i] & 0xffff) | codes[s + 1][i] << 16;
    }
  }
}

using DecodeUnitFn = void (*)(const NmGemmArgs&, int64_t panel, int64_t unit, Unit*);

template <int kBits>
OW_INLINE DecodeUnitFn unit_decoder(int32_t block) {
  switch (block) {
    case 4: return decode_unit<kBits, 4>;
    case 8: return decode_unit<kBits, 8>;
    case 16: return decode_unit<kBits, 16>;
    default: return decode_unit<kBits, 32>;
  }
}

// --- products ------------------------------------------------------------------------------------

// Of 16 outputs and up to kWidth tokens. Sums of 16 tokens are two vectors, as interleaving leaves
// them: tokens 0 to 3 and 8 to 11, then 4 to 7 and 12 to 15.
struct Sums {
  alignas(64) int32_t group[kNmPanel][kWidth];
  alignas(64) float total[kNmPanel][kWidth];
};
OW_INLINE int64_t place_of_token(int64_t t) {
  return t / kTokens * kTokens + t / 4 % 2 * 8 + t / 8 % 2 * 4 + t % 4;
}

// Adds slots [begin, end) of one output.
template <int kVectors>
void add_slots(const int16_t* x, int64_t apart, const Unit& unit, int64_t begin, int64_t end,
               int64_t lane, int32_t* sums) {
  __m256i acc[kVectors][2];
  __m256i* out = reinterpret_cast<__m256i*>(sums);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    acc[v][0] = _mm256_load_si256(out + 2 * v);
    acc[v][1] = _mm256_load_si256(out + 2 * v + 1);
  }
  for (int64_t s = begin; s < end; s += 2) {
    const bool both = s + 1 < end;  // an odd one out: its row twice, the second time no weight
    const int16_t* even = x + unit.columns[s][lane] * kTokens;
    const int16_t* odd = both ? x + unit.columns[s + 1][lane] * kTokens : even;
    const __m256i w = _mm256_set1_epi32(int(unit.pairs[s][lane] & (both ? ~0u : 0xffffu)));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + v * apart));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + v * apart));
      acc[v][0] = _mm256_add_epi32(acc[v][0], _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), w));
      acc[v][1] = _mm256_add_epi32(acc[v][1], _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), w));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    _mm256_store_si256(out + 2 * v, acc[v][0]);
    _mm256_store_si256(out + 2 * v + 1, acc[v][1]);
  }
}

// total += scale * group, and the next group begins.
OW_INLINE void close_group(const NmGemmArgs& a, int64_t panel, int64_t g, Sums* sums) {
  alignas(64) float scales[kNmPanel];
  for (int64_t i = 0; i < kNmPanel; i += kLanes) store(scales + i, load_scales(a, panel, g, i));
  for (int64_t lane = 0; lane < kNmPanel; ++lane) {
    float* total = sums->total[lane];
    for (int64_t t = 0; t < kWidth; t += kLanes) {
      const VecI sum = {_mm256_load_si256(reinterpret_cast<const __m256i*>(sums->group[lane] + t))};
      store(total + t, fma(to_float(sum), set1(scales[lane]), load(total + t)));
    }
  }
  memset(sums->group, 0, sizeof(sums->group));
}

// One panel of outputs and the vectors of tokens from `first` on.
template <int kVectors>
void multiply_tokens(const NmGemmArgs& a, int64_t panel, int64_t first) {
  const int16_t* x = static_cast<const int16_t*>(a.laid) + first * panel_size(a);
  const int64_t all = nm_slots(a.k, a.kept, a.block);
  const int64_t group_slots = a.groups == 1 ? all : a.group_size / a.block * a.kept;
  const DecodeUnitFn decode = a.bits == 4 ? unit_decoder<4>(a.block) : unit_decoder<8>(a.block);
  Sums sums;
  memset(&sums, 0, sizeof(sums));
  Unit unit;
  for (int64_t begin = 0; begin < all; begin += kNmUnit) {
    decode(a, panel, begin / kNmUnit, &unit);
    const int64_t unit_end = min_of(begin + kNmUnit, all);
    for (int64_t slot = begin; slot < unit_end;) {
      const int64_t g = slot / group_slots;
      const int64_t group_end = min_of((g + 1) * group_slots, all);
      const int64_t end = min_of(group_end, unit_end);
      for (int64_t lane = 0; lane < kNmPanel; ++lane) {
        add_slots<kVectors>(x, panel_size(a), unit, slot - begin, end - begin, lane,
                            sums.group[lane]);
      }
      if (end == group_end) close_group(a, panel, g, &sums);
      slot = end;
    }
  }
  const int64_t row = first * kTokens;
  for (int64_t t = 0; t < min_of(kVectors * kTokens, a.m - row); ++t) {
    alignas(64) float y[kNmPanel];
    for (int64_t lane = 0; lane < kNmPanel; ++lane) {
      y[lane] = sums.total[lane][place_of_token(t)] * a.x_scales[row + t];
    }
    finish(a, row + t, panel * kNmPanel, y);
  }
}

void multiply_int8(const NmGemmArgs& a, int64_t begin, int64_t end) {
  using TokensFn = void (*)(const NmGemmArgs&, int64_t panel, int64_t first);
  constexpr TokensFn kBy[] = {multiply_tokens<1>, multiply_tokens<2>, multiply_tokens<3>,
                              multiply_tokens<4>};
  const int64_t vectors = token_vectors(a);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t first = 0; first < vectors; first += kMaxVectors) {
      kBy[min_of(kMaxVectors, vectors - first) - 1](a, panel, first);
    }
  }
}

}  // namespace
}  // namespace avx2

const NmGemmKernels nm_gemm_int8_avx2 = {avx2::laid_token_bytes, avx2::kTokens,
                                         avx2::lay_out_tokens, avx2::multiply_int8};

}  // namespace ow
