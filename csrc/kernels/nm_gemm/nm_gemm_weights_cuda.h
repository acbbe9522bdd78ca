// What tensor cores are given of an N:M weight: of 2:4 the packed words themselves as the sparse
// operand, of any other pattern rows that are made dense in shared memory.
//
// The weight is A, so that a panel is the 16 rows of an instruction, and tokens are the columns of
// B. A number that one 16-bit float does not hold is a sum of several, its pieces: three bf16 are
// an fp32. The products of pieces that matter are added up in fp32.
//
//   2:4   A unit is 64 columns: two steps of mma.sp m16n8k32. Line b of nm16_n16k2 is what the
//         outputs keep of block b, two 16-bit floats in a word of 32 bits: a register of the sparse
//         operand. Words of int8 and int4 become such registers on the way. The two words of
//         an index, turned to nibbles, are the metadata of both steps: those of step 0 are read by
//         lanes 0 and 1 of each four, those of step 1 by lanes 2 and 3 (the selectors of mma.sp).
#pragma once

#include "cuda/device.h"

#include "core/types.h"
#include "cuda/codes.h"
#include "cuda/fragments.h"
#include "cuda/mma.h"
#include "kernels/nm_gemm/nm_gemm.h"

namespace ow {

constexpr int kNmFewRows = 16;       // of x, up to which weights stream
constexpr int kNmStep = 32;          // columns: an mma.sp, or two mma
constexpr int kNmTile = 64;          // columns that are loaded together: a unit of 2:4
constexpr int kNmRow = kNmTile + 8;  // 16-bit floats; ldmatrix of 8 such rows meets no bank twice

// x as the kernels read it: [pieces][m] rows of 16-bit floats.
struct NmRows {
  const void* x;
  int64_t stride, piece;  // in elements: between rows, and between pieces
  int32_t columns;        // a multiple of 8; beyond, x is zero
};

// Left out are products of at most 2^-27 of the whole.
OW_DEVICE bool nm_counts(int x_piece, int w_piece) { return x_piece + w_piece <= 2; }

// Two floats, each as a sum of bf16s: the nearest one, the nearest to the rest, and so on.
template <int kPieces>
OW_DEVICE void split(float low, float high, uint32_t (&pieces)[kPieces]) {
  OW_UNROLL
  for (uint32_t& piece : pieces) {
    piece = ptx::cvt_rn_bf16x2_f32(high, low);
    low -= bits_to_float(piece << 16);
    high -= bits_to_float(piece & 0xffff0000);
  }
}

// --- 2:4 -----------------------------------------------------------------------------------------

// The A of a step.
template <class T>
struct NmSparse {
  uint32_t a[4];
  uint32_t metadata;
};

// x and the one piece of a, of one step; selector = step.
template <class T>
OW_DEVICE void multiply(float (&d)[4], const NmSparse<T>& w, int, int step,
                        const uint32_t (&b)[4]) {
  if (step == 0) {
    mma_sparse<0>(T{}, d, w.a, b, w.metadata);
  } else {
    mma_sparse<1>(T{}, d, w.a, b, w.metadata);
  }
}

// Where byte `at` of a unit's values is in shared memory: the halves of every third and fourth line
// of 64 bytes are swapped, so that lanes that read at once meet no bank twice.
OW_DEVICE int nm_swizzled(int at) { return at ^ at / 128 % 2 * 32; }

// What one lane needs of the values of one step of a panel, of 16 bits or less.
template <class T, int kBits>
struct NmWords {
  uint32_t words[4];  // for each register of A

  // From a unit's values in shared memory, swizzled.
  OW_DEVICE void load(const uint8_t* unit, int step, int lane) {
    OW_UNROLL
    for (int i = 0; i < 4; ++i) {
      const fragments::Element e = fragments::a_sp_m16n8k32(lane, 2 * i);
      const int block = step * (kNmStep / 4) + e.column / 4;
      const int at = block * kBits / 16 * 64 + e.row * 4;
      words[i] = *reinterpret_cast<const uint32_t*>(unit + nm_swizzled(at));
    }
  }

  OW_DEVICE void decode(int lane, uint32_t (&a)[4]) const {
    OW_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBits == 16) {
        a[i] = words[i];
      } else {
        // Two's complement as codes from 0; the block is number lane % 4 of four.
        constexpr uint32_t kZero = 1 << (kBits - 1);
        const uint32_t nibbles = lane % 4 / 2 * 4;
        const uint32_t codes = kBits == 4 ? words[i] >> nibbles & 0x0f0f0f0f : words[i];
        const uint32_t first = lane % 2 * 2;
        a[i] = CodePairs<T>::template less<kBits>(codes ^ kZero * 0x01010101,
                                                  byte_pair(first, first + 1), kZero);
      }
    }
  }
};

// What one lane needs of the index of a unit of a panel: two of its words, one for each half of the
// metadata register.
struct NmKept {
  uint32_t index[2];

  OW_DEVICE void load(const uint8_t* unit, int32_t vector, int lane) {
    const int lanes = int(nm_index_lanes(vector));
    OW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const fragments::Metadata at = fragments::metadata_sp_m16n8k32(lane, half);
      const int word = at.selector * lanes + at.row * lanes / int(kNmPanel);
      index[half] = reinterpret_cast<const uint32_t*>(unit)[word];
    }
  }

  OW_DEVICE uint32_t metadata(int lane) const {
    uint32_t both = 0;
    OW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int column = fragments::metadata_sp_m16n8k32(lane, half).column;
      both |= of_columns(index[half], column) << (16 * half);
    }
    // Padding, whose index is zero twice, must be in order too: 0 and 1.
    const uint32_t any = (both | both >> 1 | both >> 2 | both >> 3) & 0x11111111;
    return both | (any ^ 0x11111111) << 2;
  }

 private:
  // Of 16 columns. Byte s % 4 of a word holds 2 bits each of four slots, so that bits 2p and 2p + 1
  // of the four bytes are the columns kept of blocks 2p and 2p + 1.
  static OW_DEVICE uint32_t of_columns(uint32_t word, int column) {
    uint32_t kept = 0;
    OW_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t slots = word >> (column / 4 + 2 * pair) & 0x03030303;
      // Moves the four to bits 24, 26, 28, 30; nothing else gets there.
      kept |= slots * 0x01041040 >> 24 << (8 * pair);
    }
    return kept;
  }
};

// --- Any pattern ---------------------------------------------------------------------------------

template <class T, int kPieces>
struct NmDense {
  uint32_t a[kPieces][2][4];  // columns 0-15 and 16-31 of the step
};

template <class T, int kPieces>
OW_DEVICE void multiply(float (&d)[4], const NmDense<T, kPieces>& w, int piece, int,
                        const uint32_t (&b)[4]) {
  mma(T{}, d, w.a[piece][0], b[0], b[1]);
  mma(T{}, d, w.a[piece][1], b[2], b[3]);
}

// The A of a step from `rows`, 16 outputs of kNmRow; pieces lie `stride` elements apart.
template <class T, int kPieces>
OW_DEVICE void load_dense(NmDense<T, kPieces>& to, const T* rows, int stride, int step, int lane) {
  OW_UNROLL
  for (int piece = 0; piece < kPieces; ++piece) {
    OW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int column = step * kNmStep + half * 16 + lane / 16 * 8;
      ptx::ldmatrix_x4(to.a[piece][half], rows + piece * stride + lane % 16 * kNmRow + column);
    }
  }
}

OW_DEVICE float value_at(const NmGemmArgs& a, const uint8_t* unit, int lane, int s) {
  if (a.bits <= 8) return float(nm_code_at(unit, a.bits, lane, s));
  if (a.value_type != FloatType::f16) return nm_float_at(unit, a.bits, lane, s);
  return to_float(reinterpret_cast<const f16*>(unit)[s / 2 * 32 + lane * 2 + s % 2]);
}

// Stores a value as pieces, `stride` elements apart.
OW_DEVICE void store_pieces(float value, f16* to, int, int) { from_float(value, to); }
OW_DEVICE void store_pieces(float value, bf16* to, int pieces, int stride) {
  for (int piece = 0; piece < pieces; ++piece) {
    const uint32_t nearest = ptx::cvt_rn_bf16x2_f32(0.0f, value);
    to[piece * stride] = bf16{uint16_t(nearest)};
    value -= bits_to_float(nearest << 16);
  }
}

// Makes columns [column, column + kNmTile) of panels from `panel` on dense: rows
// [kPieces][16 kPanels][kNmRow], by all threads that sync() waits for. Outputs past n are zero.
//
// A warp takes four slots of eight outputs at a time: whole sectors of index and values, and rows
// of which each begins four banks past the one before.
template <class T, int kPieces, int kPanels, class Sync>
OW_DEVICE void expand_tile(const NmGemmArgs& a, int64_t panel, int column, T* rows, int thread,
                           int threads, const Sync& sync) {
  constexpr int kOutputs = kPanels * int(kNmPanel);
  constexpr int kEights = kOutputs / 8;
  constexpr int kSlots = 4;
  constexpr int kTogether = 16 / int(sizeof(T));
  for (int i = thread; i < kPieces * kOutputs * kNmRow / kTogether; i += threads) {
    reinterpret_cast<uint4*>(rows)[i] = uint4{0, 0, 0, 0};
  }
  sync();
  const int first_block = column / a.block;
  const int blocks = int(min_of(kNmTile / a.block, div_up(a.k, a.block) - first_block));
  const int slots = blocks * a.kept;
  for (int i = thread; i < int(round_up(slots, kSlots)) * kOutputs; i += threads) {
    const int output = i / kWarp % kEights * 8 + i % 8;
    const int slot_of_tile = i / kWarp / kEights * kSlots + i % kWarp / 8;
    const int64_t of_panel = panel + output / int(kNmPanel);
    if (slot_of_tile >= slots || panel * kNmPanel + output >= a.n) continue;
    const int lane = output % int(kNmPanel);
    const int slot = first_block * a.kept + slot_of_tile;
    const int unit = slot / int(kNmUnit);
    const int s = slot % int(kNmUnit);
    const int64_t at = nm_index_at(nm_unit_index(a, of_panel, unit), a.block, a.vector, lane, s);
    const int to = output * kNmRow + slot_of_tile / a.kept * a.block + int(at);
    store_pieces(value_at(a, nm_unit_values(a, of_panel, unit), lane, s), rows + to, kPieces,
                 kOutputs * kNmRow);
  }
  sync();
}

// --- Sums and results ----------------------------------------------------------------------------

// Of the panel's outputs row and row + 8 of a lane's sums, in group g; 1 for values without scales.
// Columns past k, which add nothing, may be in groups past the last.
OW_DEVICE void load_scales(const NmGemmArgs& a, int64_t panel, int g, int lane,
                           float (&scales)[2]) {
  const int64_t group = panel * a.groups + min_of(g, a.groups - 1);
  OW_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t at = group * kNmPanel + fragments::d_m16n8(lane, 2 * half).row;
    scales[half] = a.scales == nullptr ? 1.0f : read_float(a.scales, a.scales_type, at);
  }
}

// Scales are needed at the end of a group; where the weight streams, they come beside it. A tile
// has those of the group it begins in, and of the next if groups are half a tile.
constexpr int kNmScaleBytes = 2 * int(kNmPanel) * 4;

// Starts copies of a panel's, by a warp.
OW_DEVICE void stage_scales(const NmGemmArgs& a, int64_t panel, int tile, int lane, uint8_t* to) {
  const int words = int(kNmPanel * float_size(a.scales_type)) / 4;  // of a group
  if (lane >= (a.group_size < kNmTile ? 2 : 1) * words) return;
  const int group = tile * kNmTile / int(a.group_size) + lane / words;
  const int64_t word = (panel * a.groups + min_of(group, a.groups - 1)) * words + lane % words;
  ptx::cp_async_ca_4(to + lane * 4, static_cast<const uint32_t*>(a.scales) + word, 4);
}
// Of outputs row and row + 8, as load_scales, for a step of the tile.
OW_DEVICE void staged_scales(const NmGemmArgs& a, const uint8_t* staged, int step, int lane,
                             float (&scales)[2]) {
  const int first = a.group_size < kNmTile ? step * int(kNmPanel) : 0;
  OW_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = fragments::d_m16n8(lane, 2 * half).row;
    scales[half] = read_float(staged, a.scales_type, first + row);
  }
}

// Adds the sums of a group's part to the totals, and begins anew.
OW_DEVICE void fold(float (&d)[4], float (&total)[4], const float (&scales)[2]) {
  OW_UNROLL
  for (int i = 0; i < 4; ++i) {
    total[i] = fmaf(d[i], scales[i / 2], total[i]);
    d[i] = 0.0f;
  }
}

OW_DEVICE void store_result(const NmGemmArgs& a, int64_t token, int64_t n, float value) {
  if (token >= a.m || n >= a.n) return;
  if (a.int8) value *= a.x_scales[token];
  if (a.bias != nullptr) value += read_float(a.bias, a.y_type, n);
  if (a.add != nullptr) value += read_float(a.add, a.y_type, token * a.n + n);
  write_float(a.y, a.y_type, token * a.n + n, value);
}

}  // namespace ow
