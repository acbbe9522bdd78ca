// Columns given by bytes. One or two rows of x: the values of a block, whatever their rows, meet x
// 64 at a time. Bytes 0 .. 3 of the 256 x of a block lie apart, in four registers each, and
// permutes of bytes look 64 columns up in them:
//
//   columns  7 200 3 ...    byte q of x   x[7].q x[200].q x[3].q ...    x   x[7] x[200] x[3] ...
//
// Then each row is a dot product of values and x that lie side by side.
#include <immintrin.h>

#include "kernels/sparse_gemm/sparse_gemm_bytes_body.h"

namespace ow::OW_TARGET {
namespace {

// Columns [begin, end) of rows of x as [m, k_blocks, 4, 256] bytes.
template <class T>
OW_INLINE void prepare_bytes_typed(const SparseXArgs& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  for (int64_t i = 0; i < a.m; ++i) {
    uint8_t* row = reinterpret_cast<uint8_t*>(a.out + i * a.k_padded);
    for (int64_t k = begin; k < end; k += kLanes) {
      const VecF columns = k < a.k ? load_n(x + i * a.k + k, a.k - k) : set1(0.0f);
      const __m512i bits = _mm512_castps_si512(columns.v);
      uint8_t* out = row + k / kBytesK * (4 * kBytesK) + k % kBytesK;
      for (int q = 0; q < 4; ++q) {
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8 * unsigned(q)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + q * kBytesK), bytes);
      }
    }
  }
}

void prepare_bytes(const SparseXArgs& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case FloatType::f32: return prepare_bytes_typed<float>(a, begin, end);
    case FloatType::bf16: return prepare_bytes_typed<bf16>(a, begin, end);
    case FloatType::f16: return prepare_bytes_typed<f16>(a, begin, end);
  }
}

// The hardware alone fetches too late: so many values and columns ahead.
constexpr int64_t kAhead = 1024;

// x of `count` columns, rounded up to 64.
OW_INLINE void look_up(const uint8_t* column, int64_t count, const __m512i* x, float* out) {
  // Unpacking takes 16-byte pieces of its operands apart; lanes 4 p + i of piece q of this order
  // become lanes 16 i + 4 p + q of four vectors.
  const __m512i order = _mm512_set_epi8(
      63, 62, 61, 60, 47, 46, 45, 44, 31, 30, 29, 28, 15, 14, 13, 12, 59, 58, 57, 56, 43, 42, 41,
      40, 27, 26, 25, 24, 11, 10, 9, 8, 55, 54, 53, 52, 39, 38, 37, 36, 23, 22, 21, 20, 7, 6, 5, 4,
      51, 50, 49, 48, 35, 34, 33, 32, 19, 18, 17, 16, 3, 2, 1, 0);
  __m512i byte_of[4][4];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) byte_of[i / 4][i % 4] = _mm512_loadu_si512(x + i);
  for (int64_t i = 0; i < count; i += 64) {
    __builtin_prefetch(column + i + kAhead);
    const __m512i columns = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(column + i));
    const __mmask64 upper = _mm512_movepi8_mask(columns);
    __m512i y[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m512i low = _mm512_permutex2var_epi8(byte_of[q][0], columns, byte_of[q][1]);
      const __m512i high = _mm512_permutex2var_epi8(byte_of[q][2], columns, byte_of[q][3]);
      y[q] = _mm512_mask_blend_epi8(upper, low, high);
    }
    const __m512i low01 = _mm512_unpacklo_epi8(y[0], y[1]);
    const __m512i high01 = _mm512_unpackhi_epi8(y[0], y[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(y[2], y[3]);
    const __m512i high23 = _mm512_unpackhi_epi8(y[2], y[3]);
    _mm512_storeu_si512(out + i, _mm512_unpacklo_epi16(low01, low23));
    _mm512_storeu_si512(out + i + 16, _mm512_unpackhi_epi16(low01, low23));
    _mm512_storeu_si512(out + i + 32, _mm512_unpacklo_epi16(high01, high23));
    _mm512_storeu_si512(out + i + 48, _mm512_unpackhi_epi16(high01, high23));
  }
}

template <class T>
void dot_panel(const SparseGemmArgs& a, int64_t row, int64_t panel) {
  const SparsePattern& w = a.w;
  const uint8_t* x = reinterpret_cast<const uint8_t*>(a.x + row * k_padded_of(w));
  float sums[kSparsePanel][kLanes] = {};
  float looked_up[kSparsePanel * kBytesK];
  for (int64_t b = 0; b < w.k_blocks; ++b, x += 4 * kBytesK) {
    const int64_t block = panel * w.k_blocks + b;
    const uint8_t* counts = block_counts(w, block);
    int64_t total = 0;
    for (int64_t r = 0; r < kSparsePanel; ++r) total += row_count(counts, r);
    look_up(counts + kCountBytes, total, reinterpret_cast<const __m512i*>(x), looked_up);
    const T* value = static_cast<const T*>(a.values) + w.offsets[block];
    const float* columns = looked_up;
    for (int64_t r = 0; r < kSparsePanel; ++r) {
      __builtin_prefetch(value + kAhead);
      __builtin_prefetch(value + kAhead + 64 / sizeof(T));
      int64_t count = row_count(counts, r);
      __m512 sum = _mm512_loadu_ps(sums[r]);
      for (; count > kLanes; count -= kLanes, value += kLanes, columns += kLanes) {
        sum = _mm512_fmadd_ps(load(value).v, _mm512_loadu_ps(columns), sum);
      }
      // What lies past a row belongs to another.
      const __mmask16 lanes = __mmask16(_bzhi_u32(0xffff, uint32_t(count)));
      sum = _mm512_mask3_fmadd_ps(load(value).v, _mm512_loadu_ps(columns), sum, lanes);
      _mm512_storeu_ps(sums[r], sum);
      value += count;
      columns += count;
    }
  }
  float line[kSparsePanel];
  for (int64_t r = 0; r < kSparsePanel; ++r) {
    line[r] = _mm512_reduce_add_ps(_mm512_loadu_ps(sums[r]));
  }
  finish_line(a, row, panel * kSparsePanel, load(line));
}

void run_dots(const SparseGemmArgs& a, int64_t begin, int64_t end, float*) {
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t row = 0; row < a.m; ++row) {
      switch (a.value_type) {
        case ValueType::f32: dot_panel<float>(a, row, panel); break;
        case ValueType::bf16: dot_panel<bf16>(a, row, panel); break;
        case ValueType::i8: dot_panel<int8_t>(a, row, panel); break;
      }
    }
  }
}

// Which of four values a row ends with take part.
constexpr __mmask16 kTail[5][4] = {{0, 0, 0, 0},
                                   {0xffff, 0, 0, 0},
                                   {0xffff, 0xffff, 0, 0},
                                   {0xffff, 0xffff, 0xffff, 0},
                                   {0xffff, 0xffff, 0xffff, 0xffff}};

// Four values are one load, where each broadcast would be one: the load ports bind. The last up to
// four values of a row are masked, not looped over: how many they are cannot be predicted.
struct AddFourBytes {
  template <int kVecs>
  OW_INLINE void add_row(const float* value, const uint8_t* column, int64_t count, const float* x,
                         float* sums) {
    VecF acc[2][kVecs];  // two chains for the latency of a multiply-add
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      acc[0][v] = load(sums + v * kLanes);
      acc[1][v] = set1(0.0f);
    }
    const auto tokens = [&](int j, int v) {
      return _mm512_loadu_ps(x + column[j] * (kVecs * kLanes) + v * kLanes);
    };
    const auto add_value = [&](int j, __m512 w) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        acc[j % 2][v].v = _mm512_fmadd_ps(w, tokens(j, v), acc[j % 2][v].v);
      }
    };
    const auto add_masked = [&](int j, __m512 w, __mmask16 lanes) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        acc[j % 2][v].v = _mm512_mask3_fmadd_ps(w, tokens(j, v), acc[j % 2][v].v, lanes);
      }
    };
    const int64_t fours = (count - (count > 0)) / 4;
    const float* tail = value + 4 * fours;
    for (; value < tail; value += 4, column += 4) {
      const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(value));
      add_value(0, _mm512_permute_ps(four, 0x00));
      add_value(1, _mm512_permute_ps(four, 0x55));
      add_value(2, _mm512_permute_ps(four, 0xaa));
      add_value(3, _mm512_permute_ps(four, 0xff));
    }
    // Reads no further than a full row would.
    const __mmask16* lanes = kTail[count - 4 * fours];
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(value));
    add_masked(0, _mm512_permute_ps(four, 0x00), lanes[0]);
    add_masked(1, _mm512_permute_ps(four, 0x55), lanes[1]);
    add_masked(2, _mm512_permute_ps(four, 0xaa), lanes[2]);
    add_masked(3, _mm512_permute_ps(four, 0xff), lanes[3]);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) store(sums + v * kLanes, add(acc[0][v], acc[1][v]));
  }
};

}  // namespace
}  // namespace ow::OW_TARGET

namespace ow {

const SparseGemmKernel sparse_gemm_bytes_rows_avx512 = {avx512::run_dots, avx512::prepare_bytes, 0};
const SparseGemmKernel sparse_gemm_bytes_avx512 = {avx512::run_bytes<avx512::AddFourBytes>,
                                                   avx512::prepare, avx512::kBytesTokens};

}  // namespace ow
