// Up to 32 rows of x that visit stored values one by one, 16 or 32 tokens wide. So narrow, a value
// is two loads and one or two multiply-adds, and walking its mask would cost more than they do. So
// the masks of some columns, a step, become lists of values and of places in the step's panel of x:
//
//   masks  0 1 1 0 ... | 0 0 1 ... | ...     list  (1, w) (2, w) (66, w) ...
//
// vpcompressb makes the columns of a mask at once. Lists are multiplied in order of their length: a
// loop that ends after as many turns as the one before costs no misprediction.
#include <immintrin.h>

#include "kernels/sparse_gemm/sparse_gemm_body.h"

namespace ow::OW_TARGET {
namespace {

// A step's panel of x fills 32 KiB, two thirds of an L1.
constexpr int64_t step_blocks(int64_t vecs) {
  return 32 * 1024 / (kSparseBlockK * vecs * kLanes * int64_t(sizeof(float)));
}
constexpr int64_t kMaxStepBlocks = step_blocks(1);
constexpr int64_t kMaxCount = kMaxStepBlocks * kSparseBlockK;
// Rows sorted together: many, so that few lists are longer than the one before, and few enough that
// lists lie in L2 (192 KiB where all is stored).
constexpr int64_t kListPanels = 4;
constexpr int64_t kListRows = kListPanels * kSparsePanel;
// Lists are written 64 elements at a time.
constexpr int64_t kListSize = kListRows * kMaxCount + 64;

constexpr int64_t kListTokens = 2 * kLanes;

// What kListRows rows store in a step.
struct Lists {
  float values[kListSize];
  uint16_t places[kListSize];  // bytes from the step's first column
  uint32_t begin[kListRows];
  uint16_t count[kListRows];
  uint16_t order[kListRows];  // shortest list first
};

// Panels [first, last) and blocks [begin, end) of k.
struct Step {
  int64_t first, last, begin, end;
};

OW_INLINE VecF load_value(const float* p) { return load(p); }
OW_INLINE VecF load_value(const bf16* p) { return load(p); }
OW_INLINE VecF load_value(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_epi8(p)))};
}

// Places of the set bits of a mask, at most 16 kPieces, whose block begins at column `first`.
template <int kVecs, int kPieces>
OW_INLINE void write_places(uint64_t mask, __m512i first, uint16_t* out) {
  constexpr int kShift = kVecs == 1 ? 6 : 7;  // bytes of a column
  const __m512i bits = _mm512_set_epi8(
      63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41,
      40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18,
      17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i columns = _mm512_maskz_compress_epi8(mask, bits);
  const auto places_of = [&](__m256i half) {
    return _mm512_slli_epi16(_mm512_add_epi16(_mm512_cvtepu8_epi16(half), first), kShift);
  };
  const __m512i low = places_of(_mm512_castsi512_si256(columns));
  if constexpr (kPieces == 1) {
    _mm256_storeu_epi16(out, _mm512_castsi512_si256(low));
  } else {
    _mm512_storeu_epi16(out, low);
  }
  if constexpr (kPieces > 2) {
    _mm512_storeu_epi16(out + 32, places_of(_mm512_extracti64x4_epi64(columns, 1)));
  }
}

OW_INLINE void store_halves(VecF piece, float* out) {
  // As halves, which cross fewer cache lines.
  _mm256_storeu_ps(out, _mm512_castps512_ps256(piece.v));
  _mm256_storeu_ps(out + 8, _mm512_extractf32x8_ps(piece.v, 1));
}

// Lists of the rows of a panel; value[b] is the next of block b. Every mask copies kPieces times
// 16, what the fullest needs: the same number of turns, no misprediction. Not inlined, as gcc would
// keep the loop's pointers on the stack.
template <int kVecs, int kPieces, class T>
__attribute__((noinline)) uint32_t list_rows(const uint64_t* masks, const T** value, int64_t blocks,
                                             int64_t row, uint32_t begin, Lists* lists) {
  uint64_t at = begin;
  for (int64_t r = 0; r < kSparsePanel; ++r) {
    const uint64_t list = at;
    __m512i first = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b) {
      uint64_t mask = masks[b * kSparsePanel + r];
      asm("" : "+r"(mask));  // gcc would count the bits of the mask register, a slow way round
      write_places<kVecs, kPieces>(mask, first, lists->places + at);
      const T* from = value[b];
#pragma GCC unroll 4
      for (int i = 0; i < kPieces; ++i) {
        const VecF piece = load_value(from + i * kLanes);
        if constexpr (kPieces == 1) {
          store_halves(piece, lists->values + at);
        } else {
          store(lists->values + at + i * kLanes, piece);
        }
      }
      const uint64_t count = uint64_t(__builtin_popcountll(mask));
      value[b] = from + count;
      at += count;
      first = _mm512_add_epi16(first, _mm512_set1_epi16(kSparseBlockK));
    }
    lists->begin[row + r] = uint32_t(list);
    lists->count[row + r] = uint16_t(at - list);
  }
  return uint32_t(at);
}

// Appends the lists of one panel at `at`, its rows being `row` and on. Returns where they end.
template <int kVecs, class T>
OW_INLINE uint32_t list_panel(const SparseGemmArgs& a, int64_t panel, const Step& step, int64_t row,
                              uint32_t at, Lists* lists) {
  const int64_t blocks = step.end - step.begin;
  const int64_t first = panel * a.w.k_blocks + step.begin;
  const uint64_t* masks = a.w.masks + first * kSparsePanel;
  const T* value[kMaxStepBlocks];
  for (int64_t b = 0; b < blocks; ++b) {
    value[b] = static_cast<const T*>(a.values) + a.w.offsets[first + b];
  }
  int64_t most = 0;
  for (int64_t i = 0; i < blocks * kSparsePanel; ++i) {
    const int64_t count = __builtin_popcountll(masks[i]);
    most = count > most ? count : most;
  }
  if (most <= kLanes) return list_rows<kVecs, 1, T>(masks, value, blocks, row, at, lists);
  if (most <= 2 * kLanes) return list_rows<kVecs, 2, T>(masks, value, blocks, row, at, lists);
  if (most <= 3 * kLanes) return list_rows<kVecs, 3, T>(masks, value, blocks, row, at, lists);
  return list_rows<kVecs, 4, T>(masks, value, blocks, row, at, lists);
}

OW_INLINE void sort_by_count(int64_t rows, Lists* lists) {
  uint16_t next[kMaxCount + 2] = {};  // place of the next row that has so many
  int64_t most = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t count = lists->count[r];
    ++next[count + 1];
    most = count > most ? count : most;
  }
  for (int64_t count = 1; count <= most; ++count) {
    next[count] = uint16_t(next[count] + next[count - 1]);
  }
  for (int64_t r = 0; r < rows; ++r) lists->order[next[lists->count[r]]++] = uint16_t(r);
}

// sums[t] += sum_j values[j] * x[places[j], t], in kChains sums at a time to hide the latency.
template <int kVecs>
OW_INLINE void add_list(const float* values, const uint16_t* places, int64_t count, const float* x,
                        float* sums) {
  constexpr int kChains = 4;
  const char* step = reinterpret_cast<const char*>(x);
  VecF acc[kChains][kVecs];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[c][v] = c == 0 ? load(sums + v * kLanes) : set1(0.0f);
  }
  const auto add_value = [&](uint64_t place, VecF w, VecF* into) {
    const float* column = reinterpret_cast<const float*>(step + place);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) into[v] = fma(w, load(column + v * kLanes), into[v]);
  };
  int64_t j = 0;
  for (; j + kChains <= count; j += kChains) {
    uint64_t four;  // one load for four places, and one for four values
    memcpy(&four, places + j, 8);
    const __m512 w = _mm512_broadcast_f32x4(_mm_loadu_ps(values + j));
    add_value(four & 0xffff, {_mm512_permute_ps(w, 0x00)}, acc[0]);
    add_value(four >> 16 & 0xffff, {_mm512_permute_ps(w, 0x55)}, acc[1]);
    add_value(four >> 32 & 0xffff, {_mm512_permute_ps(w, 0xaa)}, acc[2]);
    add_value(four >> 48, {_mm512_permute_ps(w, 0xff)}, acc[3]);
  }
  const int64_t rest = count - j;
  if (rest > 0) add_value(places[j], set1(values[j]), acc[0]);
  if (rest > 1) add_value(places[j + 1], set1(values[j + 1]), acc[1]);
  if (rest > 2) add_value(places[j + 2], set1(values[j + 2]), acc[2]);
#pragma GCC unroll 2
  for (int v = 0; v < kVecs; ++v) {
    store(sums + v * kLanes, add(add(acc[0][v], acc[1][v]), add(acc[2][v], acc[3][v])));
  }
}

// A share of what the rows of a panel store in a step, fetched while another step is multiplied:
// the panel's blocks lie far apart from those of the one before, where no prefetcher looks.
OW_INLINE void fetch_share(const SparseGemmArgs& a, int64_t panel, const Step& step,
                           int64_t share) {
  const int64_t first = panel * a.w.k_blocks + step.begin;
  const int64_t last = first + step.end - step.begin;
  const int64_t size = value_size(a.value_type);
  const int64_t all = a.w.panels * a.w.k_blocks;
  const int64_t from = a.w.offsets[first] * size;
  const int64_t bytes = (last < all ? a.w.offsets[last] : a.nnz) * size - from;
  const char* values = static_cast<const char*>(a.values) + from;
  const int64_t end = bytes * (share + 1) / kSparsePanel;
  for (int64_t at = bytes * share / kSparsePanel; at < end; at += 64) {
    __builtin_prefetch(values + at, 0, 2);
  }
  if (share < step.end - step.begin) {
    const uint64_t* masks = a.w.masks + (first + share) * kSparsePanel;
    __builtin_prefetch(masks, 0, 2);
    __builtin_prefetch(masks + 8, 0, 2);
  }
}

// Sums of panels [first, last), at most kListPanels, over all of k; x is one panel of tokens.
template <int kVecs, class T>
void sum_lists(const SparseGemmArgs& a, const float* x, int64_t first, int64_t last, Lists* lists,
               float* sums) {
  constexpr int64_t kWidth = kVecs * kLanes;
  const int64_t rows = (last - first) * kSparsePanel;
  memset(sums, 0, size_t(rows * kWidth) * sizeof(float));
  Step step{first, last, 0, min_of(step_blocks(kVecs), a.w.k_blocks)};
  while (step.begin < a.w.k_blocks) {
    uint32_t at = 0;
    for (int64_t panel = first; panel < last; ++panel) {
      at = list_panel<kVecs, T>(a, panel, step, (panel - first) * kSparsePanel, at, lists);
    }
    sort_by_count(rows, lists);
    const float* columns = x + step.begin * kSparseBlockK * kWidth;
    step.begin = step.end;
    step.end = min_of(step.end + step_blocks(kVecs), a.w.k_blocks);
    for (int64_t i = 0; i < rows; ++i) {
      if (step.begin < step.end) fetch_share(a, first + i / kSparsePanel, step, i % kSparsePanel);
      const int64_t r = lists->order[i];
      const uint32_t begin = lists->begin[r];
      add_list<kVecs>(lists->values + begin, lists->places + begin, lists->count[r], columns,
                      sums + r * kWidth);
    }
  }
}

template <int kVecs>
void sum_typed(const SparseGemmArgs& a, const float* x, int64_t first, int64_t last, Lists* lists,
               float* sums) {
  switch (a.value_type) {
    case ValueType::f32: return sum_lists<kVecs, float>(a, x, first, last, lists, sums);
    case ValueType::bf16: return sum_lists<kVecs, bf16>(a, x, first, last, lists, sums);
    case ValueType::i8: return sum_lists<kVecs, int8_t>(a, x, first, last, lists, sums);
  }
}

void run_lists(const SparseGemmArgs& a, int64_t begin, int64_t end, float* tile) {
  Lists lists;
  for_each_token_panel(a.m, kListTokens, [&](int64_t row, int64_t rows, int64_t width) {
    const float* x = a.x + row * k_padded_of(a.w);
    for (int64_t panel = begin; panel < end; panel += kListPanels) {
      const int64_t last = min_of(panel + kListPanels, end);
      if (width == kLanes) {
        sum_typed<1>(a, x, panel, last, &lists, tile);
      } else {
        sum_typed<2>(a, x, panel, last, &lists, tile);
      }
      finish_tile(a, panel * kSparsePanel, min_of(last * kSparsePanel, a.w.n), row, rows, width,
                  tile);
    }
  });
}

}  // namespace
}  // namespace ow::OW_TARGET

namespace ow {

const SparseGemmKernel sparse_gemm_lists_avx512 = {avx512::run_lists, avx512::prepare,
                                                   avx512::kListTokens};

}  // namespace ow
