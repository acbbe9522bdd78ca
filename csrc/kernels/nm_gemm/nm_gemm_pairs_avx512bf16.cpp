// Many rows of bf16 x and bf16 values: two slots at a time in vdpbf16ps, whose operands are pairs
// (x[i, c], x[i, d]) of 16 tokens and a line of `values` as it lies in memory, a pair of each
// output. Pairs are made of two columns of x once for many outputs:
//
//   2:4, an index for each output   a block has 6 pairs of columns: all are made, for every output
//   any N:M, 8 outputs to an index  the pair that the 8 share is made in registers
//
// Denormals count as zero here, as everywhere in vdpbf16ps.
#include "kernels/nm_gemm/nm_gemm_body.h"

namespace ow {
namespace avx512bf16 {
namespace {

// Tokens of a vector of bf16, which are two vectors of sums. x lies in chunks, [columns][32]; of
// 128 bits of a row the first half is of tokens 0 .. 15, and the second of 16 .. 31, so that
// unpacking two rows gives pairs of 16 tokens in order.
constexpr int64_t kChunk = 2 * kLanes;
// Outputs whose sums stay in L2 while x goes by.
constexpr int64_t kOutputPanels = 32;

OW_INLINE int64_t chunks(const NmGemmArgs& a) { return div_up(a.m, kChunk); }
OW_INLINE const bf16* laid_chunk(const NmGemmArgs& a, int64_t chunk, int64_t column) {
  return static_cast<const bf16*>(a.laid) + (chunk * nm_columns(a) + column) * kChunk;
}

int64_t laid_chunk_bytes(const NmGemmArgs& a) {
  return chunks(a) * nm_columns(a) * kChunk * int64_t(sizeof(bf16));
}

// 16 rows of x and 32 columns: columns k + 2 j and k + 2 j + 1 of them in pairs[j]. Zeros past m,
// k.
OW_INLINE void load_pairs(const NmGemmArgs& a, int64_t row, int64_t k, VecF (&pairs)[kLanes]) {
  const int64_t left = a.k - k;
  const __mmask32 mask = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
  for (int64_t t = 0; t < kLanes; ++t) {
    const bf16* from = static_cast<const bf16*>(a.x) + (row + t) * a.k + k;
    pairs[t] = as_float(VecI{_mm512_maskz_loadu_epi16(row + t < a.m ? mask : 0u, from)});
  }
  transpose(pairs);
}

void lay_out_chunks(const NmGemmArgs& a, int64_t begin, int64_t end) {
  const __m512i first = _mm512_set1_epi32(0xffff);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    bf16* out = static_cast<bf16*>(a.laid) + chunk * nm_columns(a) * kChunk;
    for (int64_t k = 0; k < nm_columns(a); k += 2 * kLanes) {
      VecF low[kLanes], high[kLanes];
      load_pairs(a, chunk * kChunk, k, low);
      load_pairs(a, chunk * kChunk + kLanes, k, high);
      for (int64_t j = 0; j < kLanes && k + 2 * j < nm_columns(a); ++j) {
        const __m512i l = as_int(low[j]).v;
        const __m512i h = as_int(high[j]).v;
        bf16* row = out + (k + 2 * j) * kChunk;
        _mm512_storeu_si512(
            row, _mm512_packus_epi32(_mm512_and_si512(l, first), _mm512_and_si512(h, first)));
        _mm512_storeu_si512(
            row + kChunk, _mm512_packus_epi32(_mm512_srli_epi32(l, 16), _mm512_srli_epi32(h, 16)));
      }
    }
  }
}

OW_INLINE __m512i broadcast_pair(const uint8_t* values) {
  int32_t pair;
  memcpy(&pair, values, 4);
  return _mm512_set1_epi32(pair);
}

// Prefetches share `i` of `shares`, into L1 (kLevel = 3) or L2 (2).
template <int kLevel>
OW_INLINE void fetch_share(const void* from, int64_t bytes, int64_t i, int64_t shares) {
  const uint8_t* p = static_cast<const uint8_t*>(from);
  for (int64_t at = bytes * i / shares; at < bytes * (i + 1) / shares; at += 64) {
    __builtin_prefetch(p + at, 0, kLevel);
  }
}

// --- 2:4, an index for each output ---------------------------------------------------------------

// Blocks multiplied at a time, a unit: their pairs of 4 vectors of tokens are 24 KiB, and stay in
// L1. Half the blocks of 8 vectors were 3 % slower.
constexpr int64_t kStepBlocks = 16;
constexpr int64_t kPairVectors = 4;
// Outputs at a time: 16 sums hide the latency of vdpbf16ps.
constexpr int kRows = 4;
constexpr int64_t kPairsOfBlock = 6;

// All pairs of columns of some blocks, [blocks][6][kVectors][16 tokens][2]. The last chunk may have
// tokens in its first half only.
template <int kVectors>
OW_INLINE void make_pairs(const NmGemmArgs& a, int64_t chunk, int64_t block, int64_t blocks,
                          uint8_t* out) {
  constexpr int kPair[kPairsOfBlock][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
  for (int v = 0; v < kVectors; v += 2) {
    const bf16* x = laid_chunk(a, chunk + v / 2, block * 4);
    uint8_t* to = out + v * 64;
    for (int64_t b = 0; b < blocks; ++b, x += 4 * kChunk) {
      __m512i column[4];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) column[c] = _mm512_loadu_si512(x + c * kChunk);
#pragma GCC unroll 6
      for (int p = 0; p < kPairsOfBlock; ++p, to += kVectors * 64) {
        const __m512i one = column[kPair[p][0]];
        const __m512i two = column[kPair[p][1]];
        _mm512_store_si512(to, _mm512_unpacklo_epi16(one, two));
        if (v + 1 < kVectors) _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(one, two));
      }
    }
  }
}

// Where the pair of each output lies among those of its block, in bytes: [b / 2][output][b % 2].
using PairOffsets = uint16_t[kStepBlocks / 2][kNmPanel][2];

// Of an even number of blocks. Two indices of two bits, ascending, name the pair.
OW_INLINE void find_pairs(const uint8_t* index, int64_t blocks, __m512i table, PairOffsets out) {
  for (int64_t line = 0; line < div_up(blocks, 8); ++line) {
    const __m512i lanes = _mm512_loadu_si512(index + line * 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i both =
          _mm512_and_si512(_mm512_srli_epi32(lanes, unsigned(2 * i)), _mm512_set1_epi8(3));
      const __m512i name = _mm512_or_si512(both, _mm512_srli_epi16(both, 6));
      _mm512_store_si512(out[line * 4 + i], _mm512_permutexvar_epi16(name, table));
    }
  }
}
// The table of that: the pair (c, d) at c + 4 d, here as c and d of a row; others do not occur.
OW_INLINE __m512i pair_table(int64_t bytes) {
  const __m512i pairs =
      _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 0, 1, 2, 0, 0, 3, 4, 1, 3, 0, 5, 2, 4, 5, 0));
  return _mm512_mullo_epi16(pairs, _mm512_set1_epi16(int16_t(bytes)));
}

// sums[kRows][kVectors * 16] += the outputs from `lane` on, of an even number of blocks. Each
// product loads its pair of x, and loads bind: so weights and offsets are loaded 4 at a time (a
// broadcast for each weight took 10 % longer). Its own function, so that the sums stay in
// registers.
template <int kVectors>
__attribute__((noinline)) void multiply_pairs(const uint8_t* x, const PairOffsets offsets,
                                              const uint8_t* values, int64_t blocks, int64_t lane,
                                              float* sums) {
  VecF acc[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(sums + (r * kVectors + v) * kLanes);
  }
  constexpr int64_t kBlockBytes = kPairsOfBlock * kVectors * 64;
  const uint16_t* offset = offsets[0][lane];
  values += lane * 4;
  for (int64_t b = 0; b < blocks; b += 2, offset += 2 * kNmPanel) {
    uint64_t places[2];
    memcpy(places, offset, 16);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h, x += kBlockBytes, values += 64) {
      __m128i four;
      memcpy(&four, values, 16);
      const __m512i quad = _mm512_broadcast_i32x4(four);
      const __m512i w[4] = {
          _mm512_shuffle_epi32(quad, _MM_PERM_AAAA), _mm512_shuffle_epi32(quad, _MM_PERM_BBBB),
          _mm512_shuffle_epi32(quad, _MM_PERM_CCCC), _mm512_shuffle_epi32(quad, _MM_PERM_DDDD)};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* pair = x + uint16_t(places[r / 2] >> (r % 2 * 32 + h * 16));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) dot2(acc[r][v], w[r], pair + v * 64);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + (r * kVectors + v) * kLanes, acc[r][v]);
  }
}

template <int kVectors>
void multiply_2_4(const NmGemmArgs& a, int64_t chunk, int64_t begin, int64_t end) {
  alignas(64) float sums[kOutputPanels][kNmPanel][kVectors * kLanes];
  alignas(64) uint8_t pairs[kStepBlocks * kPairsOfBlock * kVectors * 64];
  alignas(64) PairOffsets offsets;
  const __m512i table = pair_table(kVectors * 64);
  const int64_t all = round_up(div_up(a.k, 4), 2);
  for (int64_t first = begin; first < end; first += kOutputPanels) {
    const int64_t panels = min_of(kOutputPanels, end - first);
    memset(sums, 0, size_t(panels) * sizeof(sums[0]));
    for (int64_t block = 0; block < all; block += kStepBlocks) {
      const int64_t unit = block / kStepBlocks;
      const int64_t blocks = min_of(kStepBlocks, all - block);
      make_pairs<kVectors>(a, chunk, block, blocks, pairs);
      for (int64_t p = 0; p < panels; ++p) {
        find_pairs(nm_unit_index(a, first + p, unit), blocks, table, offsets);
        const uint8_t* values = nm_unit_values(a, first + p, unit);
        const int64_t next = p + 1 < panels ? first + p + 1 : first;
        fetch_share<3>(nm_unit_index(a, next, unit), 128, 0, 1);
        for (int v = 0; v < kVectors; v += 2) {
          fetch_share<2>(laid_chunk(a, chunk + v / 2, (block + kStepBlocks) * 4),
                         kStepBlocks * 4 * kChunk * 2, p, panels);
        }
        for (int64_t lane = 0; lane < kNmPanel; lane += kRows) {
          fetch_share<3>(nm_unit_values(a, next, unit), kStepBlocks * 64, lane / kRows,
                         kNmPanel / kRows);
          multiply_pairs<kVectors>(pairs, offsets, values, blocks, lane, sums[p][lane]);
        }
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      finish_tile(a, first + p, chunk * kChunk, kVectors * kLanes, sums[p][0]);
    }
  }
}

// --- any pattern, 8 outputs or more to an index --------------------------------------------------

// Outputs that share a pair in registers: 16 sums, and 8 loads and 2 permutations for 16 products.
constexpr int kSharing = 8;
// Units multiplied at a time, and the columns they may span: 16 KiB of a chunk.
constexpr int64_t kStepUnits = 4;
constexpr int64_t kStepColumns = 256;
constexpr int64_t kStepSlots = kStepUnits * kNmUnit;
constexpr int64_t kSharedVectors = 8;

// Where the columns of each slot are in a chunk, in bytes, for each half of a panel.
using SlotOffsets = uint32_t[2][kStepSlots];

// Slots s .. s + 15 of a unit, whose index lines are of `lanes` outputs: out = base + 64 * index.
template <int kBlock>
OW_INLINE void find_slots(const uint8_t* index, int64_t lanes, int64_t s, const uint32_t* base,
                          uint32_t* out) {
  constexpr int kLow = kBlock <= 8 ? 2 : 4;  // bits of a field, and lines of fields
  const auto line = [&](int64_t i) {
    int32_t word;
    memcpy(&word, index + i * lanes * 4, 4);
    return _mm512_set1_epi32(word);
  };
  const __m512i slot = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i three = _mm512_set1_epi32(3);
  const __m512i byte = _mm512_slli_epi32(_mm512_and_si512(slot, three), 3);
  const __m512i quad = _mm512_srli_epi32(slot, 2);
  __m512i low;
  if constexpr (kLow == 2) {
    const __m512i shift = _mm512_add_epi32(byte, _mm512_slli_epi32(quad, 1));
    low = _mm512_and_si512(_mm512_srlv_epi32(line(s / 16), shift), three);
  } else {
    const __m512i lines = _mm512_mask_blend_epi32(0xff00, line(s / 8), line(s / 8 + 1));
    const __m512i odd = _mm512_and_si512(quad, _mm512_set1_epi32(1));
    const __m512i shift = _mm512_add_epi32(byte, _mm512_slli_epi32(odd, 2));
    low = _mm512_and_si512(_mm512_srlv_epi32(lines, shift), _mm512_set1_epi32(15));
  }
  __m512i offset = _mm512_slli_epi32(low, 6);
  if constexpr (kBlock == 8 || kBlock == 32) {
    const __m512i shift =
        _mm512_add_epi32(_mm512_add_epi32(byte, quad), _mm512_set1_epi32(int(s / 4)));
    const __m512i high =
        _mm512_and_si512(_mm512_srlv_epi32(line(kLow), shift), _mm512_set1_epi32(1));
    offset = _mm512_add_epi32(offset, _mm512_slli_epi32(high, 6 + kLow));
  }
  _mm512_storeu_si512(out, _mm512_add_epi32(offset, _mm512_loadu_si512(base)));
}

template <int kBlock>
OW_INLINE void find_units(const NmGemmArgs& a, int64_t panel, int64_t unit, int64_t units,
                          const uint32_t* base, SlotOffsets out) {
  const int64_t lanes = nm_index_lanes(a.vector);
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t s = 0; s < kNmUnit; s += 16) {
      const uint8_t* index = nm_unit_index(a, panel, unit + u);
      const int64_t at = u * kNmUnit + s;
      find_slots<kBlock>(index, lanes, s, base + at, out[0] + at);
      if (lanes == 2) find_slots<kBlock>(index + 4, lanes, s, base + at, out[1] + at);
    }
  }
}

// sums[8][stride] += 8 outputs times kVectors vectors of tokens.
template <int kVectors>
__attribute__((noinline)) void multiply_shared(const uint8_t* x, const uint32_t* offsets,
                                               const uint8_t* values, int64_t slots, float* sums,
                                               int64_t stride) {
  VecF acc[kSharing][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kSharing; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[r][v] = load(sums + r * stride + v * kLanes);
  }
  for (int64_t s = 0; s < slots; s += 2, values += 64) {
    const __m512i one = _mm512_loadu_si512(x + offsets[s]);
    const __m512i two = _mm512_loadu_si512(x + offsets[s + 1]);
    const __m512i low = _mm512_unpacklo_epi16(one, two);
    const __m512i high = _mm512_unpackhi_epi16(one, two);
#pragma GCC unroll 8
    for (int r = 0; r < kSharing; ++r) {
      const __m512i w = broadcast_pair(values + r * 4);
      dot2(acc[r][0], w, low);
      if constexpr (kVectors == 2) dot2(acc[r][1], w, high);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kSharing; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(sums + r * stride + v * kLanes, acc[r][v]);
  }
}

template <int kBlock>
void multiply_any(const NmGemmArgs& a, int64_t chunk, int64_t vectors, int64_t begin, int64_t end) {
  alignas(64) float sums[kOutputPanels * kNmPanel * kSharedVectors * kLanes];
  alignas(64) uint32_t base[kStepSlots];
  alignas(64) SlotOffsets offsets;
  const int64_t stride = vectors * kLanes;
  const int64_t all = nm_units(a);
  const int64_t slots = round_up(nm_slots(a.k, a.kept, a.block), 2);
  const int64_t fit = kStepColumns * a.kept / (a.block * kNmUnit);
  const int64_t step = fit < 1 ? 1 : min_of(fit, kStepUnits);
  for (int64_t first = begin; first < end; first += kOutputPanels) {
    const int64_t panels = min_of(kOutputPanels, end - first);
    memset(sums, 0, size_t(panels * kNmPanel * stride) * sizeof(float));
    for (int64_t unit = 0; unit < all; unit += step) {
      const int64_t units = min_of(step, all - unit);
      const int64_t count = min_of(units * kNmUnit, slots - unit * kNmUnit);
      for (int64_t s = 0; s < units * kNmUnit; ++s) {
        base[s] = uint32_t((unit * kNmUnit + s) / a.kept * a.block * kChunk * 2);
      }
      for (int64_t p = 0; p < panels; ++p) {
        find_units<kBlock>(a, first + p, unit, units, base, offsets);
        const int64_t next = p + 1 < panels ? first + p + 1 : first;
        const uint8_t* values = nm_unit_values(a, first + p, unit);
        const int64_t bytes = units * nm_unit_value_bytes(16);
        fetch_share<3>(nm_unit_index(a, next, unit), 128, 0, 1);
        for (int64_t v = 0; v < vectors; v += 2) {
          fetch_share<3>(nm_unit_values(a, next, unit), bytes, v / 2, div_up(vectors, 2));
          const uint8_t* x = reinterpret_cast<const uint8_t*>(laid_chunk(a, chunk + v / 2, 0));
          fetch_share<2>(x + base[0] + step * kNmUnit / a.kept * a.block * kChunk * 2,
                         step * kNmUnit / a.kept * a.block * kChunk * 2, p, panels);
          for (int64_t h = 0; h < 2; ++h) {
            const auto multiply = v + 1 < vectors ? multiply_shared<2> : multiply_shared<1>;
            multiply(x, offsets[a.vector == 8 ? h : 0], values + h * kSharing * 4, count,
                     sums + (p * kNmPanel + h * kSharing) * stride + v * kLanes, stride);
          }
        }
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      finish_tile(a, first + p, chunk * kChunk, stride, sums + p * kNmPanel * stride);
    }
  }
}

// --- dispatch ------------------------------------------------------------------------------------

// Chunks [chunk, chunk + some) are of `vectors` vectors of tokens.
void multiply_tokens(const NmGemmArgs& a, int64_t chunk, int64_t vectors, int64_t begin,
                     int64_t end) {
  if (a.vector == 1) {
    switch (vectors) {
      case 1: return multiply_2_4<1>(a, chunk, begin, end);
      case 2: return multiply_2_4<2>(a, chunk, begin, end);
      case 3: return multiply_2_4<3>(a, chunk, begin, end);
      default: return multiply_2_4<4>(a, chunk, begin, end);
    }
  }
  switch (a.block) {
    case 4: return multiply_any<4>(a, chunk, vectors, begin, end);
    case 8: return multiply_any<8>(a, chunk, vectors, begin, end);
    case 16: return multiply_any<16>(a, chunk, vectors, begin, end);
    default: return multiply_any<32>(a, chunk, vectors, begin, end);
  }
}

void multiply_chunks(const NmGemmArgs& a, int64_t begin, int64_t end) {
  const int64_t panel_chunks = (a.vector == 1 ? kPairVectors : kSharedVectors) / 2;
  const int64_t panels = div_up(chunks(a), panel_chunks);
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t chunk = chunks(a) * i / panels;
    const int64_t vectors =
        min_of((chunks(a) * (i + 1) / panels - chunk) * 2, div_up(a.m - chunk * kChunk, kLanes));
    multiply_tokens(a, chunk, vectors, begin, end);
  }
}

}  // namespace
}  // namespace avx512bf16

const NmGemmKernels nm_gemm_pairs_avx512bf16 = {avx512bf16::laid_chunk_bytes, avx512bf16::kChunk,
                                                avx512bf16::lay_out_chunks,
                                                avx512bf16::multiply_chunks};

}  // namespace ow
