// Up to 32 rows of x that visit stored values one by one, 16 or 32 tokens wide. So narrow, a value
// is two loads and one or two multiply-adds, and a loop over a mask that ends after another number
// of turns than the one before costs more than they do. So the masks of a step, 128 rows by one or
// two blocks, are sorted by how many values they choose:
//
//   masks  0110 0100 1110 0001 ...     visits  | 0100 0001 ... | 0110 ... | 1110 ... |
//
// and a step has few loops that end unexpectedly. (Lists of values and columns, which cover more of
// k at a time, measured 15 % slower on Zen 4 for 16 rows: a list costs as much to make as a sort
// and the sums it saves.)
#include <immintrin.h>

#include "kernels/sparse_gemm/sparse_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

constexpr int64_t kSortTokens = 2 * kLanes;
constexpr int64_t kSortPanels = 8;
constexpr int64_t kSortRows = kSortPanels * kSparsePanel;

// A row of a block: what its mask chooses, and where.
struct Visit {
  uint64_t mask;
  uint32_t value;  // the first one's place
  uint32_t sums;   // bytes from the sums of the first row
};

// The visits of a step by their number of values. 192 bytes more than masks need keep the starts of
// lists out of each other's cache sets.
struct Visits {
  Visit of_count[kMaskK + 1][kSortRows + 12];
  Visit* end[kMaskK + 1];
};

// Of panels [first, last) in block b of k.
template <int kVecs>
OW_INLINE void sort_masks(const SparsePattern& w, int64_t first, int64_t last, int64_t b,
                          Visits* visits) {
  constexpr uint64_t kRowBytes = kVecs * kLanes * sizeof(float);
  for (int64_t count = 0; count <= kMaskK; ++count) {
    visits->end[count] = visits->of_count[count];
  }
  uint64_t sums = 0;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t block = panel * w.k_blocks + b;
    const uint64_t* masks = w.masks + block * kSparsePanel;
    // Those of the next step.
    __builtin_prefetch(masks + kSparsePanel);
    __builtin_prefetch(masks + kSparsePanel + 8);
    uint64_t place = uint32_t(w.offsets[block]) | sums << 32;  // a visit but for its mask
    sums += kSparsePanel * kRowBytes;
#pragma GCC unroll 4
    for (int64_t r = 0; r < kSparsePanel; ++r) {
      uint64_t mask = masks[r];
      asm("" : "+r"(mask));  // gcc would count the bits of the mask register, a slow way round
      const uint64_t count = uint64_t(__builtin_popcountll(mask));
      Visit* visit = visits->end[count]++;
      visit->mask = mask;
      memcpy(&visit->value, &place, 8);
      place += count + (kRowBytes << 32);
    }
  }
}

// Four values, in every four lanes.
OW_INLINE __m512 four_values(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
OW_INLINE __m512 four_values(const bf16* p) {
  const __m128i bits = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadu_si64(p)), 16);
  return _mm512_broadcast_f32x4(_mm_castsi128_ps(bits));
}
OW_INLINE __m512 four_values(const int8_t* p) {
  return _mm512_broadcast_f32x4(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_loadu_si32(p))));
}

// The lowest bit of a mask, and the mask without it. gcc, whose flags for the tier leave out BMI1,
// would take twice the instructions, and these bind.
OW_INLINE uint64_t lowest_of(uint64_t mask) {
  uint64_t bit;
  asm("tzcnt %1, %0" : "=r"(bit) : "r"(mask) : "cc");
  return bit;
}
OW_INLINE uint64_t drop_lowest(uint64_t mask) {
  uint64_t rest;
  asm("blsr %1, %0" : "=r"(rest) : "r"(mask) : "cc");
  return rest;
}

// sums[t] += sum_j value_j * x[column_j, t] for visits [visit, end) of 4 fours + kRest values. Each
// four fetches what lies `ahead` bytes on, where the next step's values are. Not inlined: gcc would
// keep the loop's pointers on the stack.
template <int kVecs, int kRest, class T>
__attribute__((noinline)) void add_visits(const Visit* visit, const Visit* end, int64_t fours,
                                          const T* values, int64_t ahead, const float* x,
                                          float* sums) {
  for (; visit < end; ++visit) {
    float* row = reinterpret_cast<float*>(reinterpret_cast<char*>(sums) + visit->sums);
    const T* value = values + visit->value;
    uint64_t mask = visit->mask;
    VecF acc[2][kVecs];  // two chains for the latency of a multiply-add
    for (auto& chain : acc) {
#pragma GCC unroll 2
      for (VecF& sum : chain) sum = set1(0.0f);
    }
    const auto add_value = [&](VecF w, VecF* into) {
      const float* column = x + lowest_of(mask) * (kVecs * kLanes);
      mask = drop_lowest(mask);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) into[v] = fma(w, load(column + v * kLanes), into[v]);
    };
    for (int64_t i = 0; i < fours; ++i, value += 4) {
      __builtin_prefetch(reinterpret_cast<const char*>(value) + ahead);
      const __m512 four = four_values(value);
      add_value({_mm512_permute_ps(four, 0x00)}, acc[0]);
      add_value({_mm512_permute_ps(four, 0x55)}, acc[1]);
      add_value({_mm512_permute_ps(four, 0xaa)}, acc[0]);
      add_value({_mm512_permute_ps(four, 0xff)}, acc[1]);
    }
    if constexpr (kRest > 0) {
      // Reads no further than a full mask would.
      const __m512 four = four_values(value);
      add_value({_mm512_permute_ps(four, 0x00)}, acc[0]);
      if constexpr (kRest > 1) add_value({_mm512_permute_ps(four, 0x55)}, acc[1]);
      if constexpr (kRest > 2) add_value({_mm512_permute_ps(four, 0xaa)}, acc[0]);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* sum = row + v * kLanes;
      store(sum, add(load(sum), add(acc[0][v], acc[1][v])));
    }
  }
}

template <int kVecs, class T>
OW_INLINE void add_step(const Visits& visits, const T* values, int64_t ahead, const float* x,
                        float* sums) {
  for (int64_t count = 1; count <= kMaskK; ++count) {
    const Visit* first = visits.of_count[count];
    const Visit* end = visits.end[count];
    if (first == end) continue;
    const int64_t fours = count / 4;
    switch (count % 4) {
      case 0: add_visits<kVecs, 0>(first, end, fours, values, ahead, x, sums); break;
      case 1: add_visits<kVecs, 1>(first, end, fours, values, ahead, x, sums); break;
      case 2: add_visits<kVecs, 2>(first, end, fours, values, ahead, x, sums); break;
      default: add_visits<kVecs, 3>(first, end, fours, values, ahead, x, sums); break;
    }
  }
}

// Sums of panels [first, last), at most kSortPanels, over all of k; x is one panel of tokens.
template <int kVecs, class T>
void sum_sorted(const SparseGemmArgs& a, const float* x, int64_t first, int64_t last, float* sums) {
  constexpr int64_t kWidth = kVecs * kLanes;
  Visits visits;
  memset(sums, 0, size_t((last - first) * kSparsePanel * kWidth) * sizeof(float));
  const int32_t* offsets = a.w.offsets + first * a.w.k_blocks;
  for (int64_t b = 0; b < a.w.k_blocks; ++b) {
    sort_masks<kVecs>(a.w, first, last, b, &visits);
    // About where the next step's values are, as panels store alike.
    const int64_t ahead = b + 1 < a.w.k_blocks ? offsets[b + 1] - offsets[b] : 0;
    add_step<kVecs>(visits, static_cast<const T*>(a.values), ahead * int64_t(sizeof(T)),
                    x + b * kMaskK * kWidth, sums);
  }
}

template <int kVecs>
void sum_typed(const SparseGemmArgs& a, const float* x, int64_t first, int64_t last, float* sums) {
  switch (a.value_type) {
    case ValueType::f32: return sum_sorted<kVecs, float>(a, x, first, last, sums);
    case ValueType::bf16: return sum_sorted<kVecs, bf16>(a, x, first, last, sums);
    case ValueType::i8: return sum_sorted<kVecs, int8_t>(a, x, first, last, sums);
  }
}

void run_sorted(const SparseGemmArgs& a, int64_t begin, int64_t end, float* tile) {
  for_each_token_panel(a.m, kSortTokens, [&](int64_t row, int64_t rows, int64_t width) {
    const float* x = a.x + row * k_padded_of(a.w);
    for (int64_t panel = begin; panel < end; panel += kSortPanels) {
      const int64_t last = min_of(panel + kSortPanels, end);
      if (width == kLanes) {
        sum_typed<1>(a, x, panel, last, tile);
      } else {
        sum_typed<2>(a, x, panel, last, tile);
      }
      finish_tile(a, panel * kSparsePanel, min_of(last * kSparsePanel, a.w.n), row, rows, width,
                  tile);
    }
  });
}

}  // namespace
}  // namespace ow::OW_TARGET

namespace ow {

const SparseGemmKernel sparse_gemm_sorted_avx512 = {avx512::run_sorted, avx512::prepare,
                                                    avx512::kSortTokens};

}  // namespace ow
