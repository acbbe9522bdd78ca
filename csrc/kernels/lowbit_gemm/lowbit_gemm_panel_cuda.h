// What a warp computes: a panel of the weight, 32 outputs, times tiles of 8 rows of x.
//
// Why the CPU's layout serves. The weight is A of the tensor core instructions, 16 outputs by k; x
// is B, k by 8 rows. The k of a product may come in any order in which A and B agree, and the
// outputs in any in which D is read. Lane 4g + t takes, of every 32 k of a panel,
//
//   outputs 4g .. 4g + 3, which are 16 bytes of a line
//   k = 8t .. 8t + 7, of whose codes every layout has all in one to three lines
//
//   half 0 (g = 0 .. 3)                 half 1 (g = 4 .. 7)             w4_n32k8: 16 bytes a lane,
//   | n0..3 | n4..7 | n8..11 | n12..15 | n16..19 | ...                 512 of a warp in a row
//   t = 0: k = 0..3 | 4..7 in the low | high nibbles
//   t = 1: k = 8..11 | 12..15 ...
//
// Word i of the 16 bytes is row g (i = 0, 2) or g + 8 (i = 1, 3) of the first (i = 0, 1) or second
// tile of 16 outputs. Unpacked, its four bytes of k and the four above them are registers of A for
// m16n8k32 as they are, and for two m16n8k16 once they are floats. B is 8 consecutive elements of a
// row of x, and D leaves lane 4g + t with outputs 4g .. 4g + 3 of rows 2t and 2t + 1.
//
// Zero points are subtracted from the codes, which is exact: c - z is an integer of at most 9 bits.
// A signed byte holds it but for 8 bits: those are c - 128, and (z - 128) sum_k x is subtracted
// from the sum, with sum_k x by a product with ones.
#pragma once

#include "cuda/codes.h"
#include "cuda/mma.h"
#include "kernels/lowbit_gemm/lowbit_gemm_task_cuda.h"

namespace ow {

constexpr int kPieceBytes = 16;
constexpr uint32_t kByteOnes = 0x01010101;

// 16-byte pieces of lines that a lane needs of a block.
template <int kBits>
constexpr int kPieces = kBits == 8   ? 2
                        : kBits == 3 ? 3
                                     : 1;

// Bytes of a block of a panel, and where in it the pieces of a lane are.
template <int kBits>
constexpr int kSpanBytes = int(kPanel) * kBlockK * kBits / 8;
template <int kBits>
OW_DEVICE int piece_at(int lane, int piece) {
  constexpr int kLine = 64;
  const int t = lane % 4;
  int unit = t / 2;
  int line = 0;
  if (kBits == 8) line = t % 2 * 2 + piece;
  if (kBits == 4) line = t % 2;
  if (kBits == 3) {  // its k_block is the whole block
    unit = 0;
    line = piece == 2 ? 2 : (2 * t + piece) / 3;
  }
  const int half_bytes = int(block_bytes(kBits) / 2);
  return (unit * 2 + lane / 16) * half_bytes + line * kLine + lane / 4 % 4 * kPieceBytes;
}

// Codes of one output, four bytes each.
struct Codes {
  uint32_t low;   // k = 8t .. 8t + 3
  uint32_t high;  // k = 8t + 4 .. 8t + 7
};

// Codes j = k / 4 of 32 k, in a line of w3_n32k32.
OW_DEVICE uint32_t three_bits(int j, uint32_t line, uint32_t last_line) {
  const uint32_t code = line >> (j % 3 * 3);
  if (j % 3 != 2) return code & 7 * kByteOnes;
  return (code & 3 * kByteOnes) | (last_line >> (6 + j / 3) & kByteOnes) << 2;
}

// words: that of the output in every piece.
template <int kBits>
OW_DEVICE Codes codes_of(int t, const uint32_t (&words)[kPieces<kBits>]) {
  if constexpr (kBits == 8) {
    return {words[0], words[1]};
  } else if constexpr (kBits == 4) {
    return {words[0] & 15 * kByteOnes, words[0] >> 4 & 15 * kByteOnes};
  } else if constexpr (kBits == 2) {
    const uint32_t word = words[0] >> (t % 2 * 4);
    return {word & 3 * kByteOnes, word >> 2 & 3 * kByteOnes};
  } else {
    return {three_bits(2 * t, words[0], words[2]), three_bits(2 * t + 1, words[1], words[2])};
  }
}

// What the weight and x are multiplied as: f16, bf16 or int8_t.
template <class X>
struct Operand {
  using Sum = float;
  static constexpr int kSteps = 2;  // instructions for a block and 16 outputs
};
template <>
struct Operand<int8_t> {
  using Sum = int;
  static constexpr int kSteps = 1;
};

// A of a block: of two tiles of 16 outputs, for each instruction.
template <class X>
struct Fragments {
  uint32_t a[Operand<X>::kSteps][2][4];
};

// pieces and zeros: of this lane and its four outputs.
template <class X, int kBits>
OW_DEVICE Fragments<X> unpack(int t, const uint4 (&pieces)[kPieces<kBits>],
                              const uint32_t (&zeros)[4]) {
  Fragments<X> fragments;
  OW_UNROLL
  for (int i = 0; i < 4; ++i) {
    uint32_t words[kPieces<kBits>];
    OW_UNROLL
    for (int p = 0; p < kPieces<kBits>; ++p) {
      const uint4& piece = pieces[p];
      words[p] = i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w;
    }
    const Codes codes = codes_of<kBits>(t, words);
    const uint32_t of_k[2] = {codes.low, codes.high};
    OW_UNROLL
    for (int h = 0; h < 2; ++h) {
      if constexpr (sizeof(X) == 1) {
        constexpr uint32_t kSigns = 0x80 * kByteOnes;
        // No byte borrows of the next: each is at least 128.
        const uint32_t less = kBits == 8 ? of_k[h] : (of_k[h] | kSigns) - zeros[i] * kByteOnes;
        fragments.a[0][i / 2][i % 2 + 2 * h] = less ^ kSigns;
      } else {
        uint32_t(&a)[4] = fragments.a[h][i / 2];
        a[i % 2] = CodePairs<X>::template less<kBits>(of_k[h], byte_pair(0, 1), zeros[i]);
        a[i % 2 + 2] = CodePairs<X>::template less<kBits>(of_k[h], byte_pair(2, 3), zeros[i]);
      }
    }
  }
  return fragments;
}

// Where a panel's scales and zero points of a group are for a lane's outputs. Past the last group,
// that one again: k padding may be in it, and what is loaded ahead.
OW_DEVICE int64_t group_at(const LowbitGemmArgs& args, int64_t panel, int group, int lane) {
  return (panel * args.groups + min_of(group, args.groups - 1)) * kPanel + lane / 4 * 4;
}

// The zero points of four outputs, a byte each.
OW_DEVICE uint32_t load_zeros(const LowbitGemmArgs& args, int64_t at) {
  if (args.w_zeros == nullptr) return kByteOnes << (args.bits - 1);
  return *reinterpret_cast<const uint32_t*>(args.w_zeros + at);
}

// The scales of four outputs as they are stored, and as floats.
OW_DEVICE uint4 load_scales(const LowbitGemmArgs& args, int64_t at) {
  if (args.w_scales_type == FloatType::f32) {
    return *reinterpret_cast<const uint4*>(static_cast<const float*>(args.w_scales) + at);
  }
  const uint2 halves =
      *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(args.w_scales) + at);
  return {halves.x, halves.y, 0, 0};
}
OW_DEVICE void scales_of(const uint4& stored, FloatType type, float (&scales)[4]) {
  const uint32_t words[4] = {stored.x, stored.y, stored.z, stored.w};
  OW_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t half = words[i / 2] >> (i % 2 * 16);
    scales[i] = type == FloatType::f32    ? bits_to_float(words[i])
                : type == FloatType::bf16 ? bits_to_float(half << 16)
                                          : ptx::cvt_f32_f16(uint16_t(half));
  }
}

// The sum of a warp over consecutive blocks of a panel. Rows of x are digit rows where
// kDigits = 3, and tile j is digit j % 3 of eight rows. kHalves: groups are half a block.
template <class X, int kDigits, int kBits, int kTiles, bool kHalves>
class PanelSum {
 public:
  static constexpr int kSteps = Operand<X>::kSteps;

  OW_DEVICE PanelSum(const LowbitGemmArgs& args, int64_t panel, int block, int64_t row0, int lane)
      : args_(args), panel_(int(panel)), row0_(int(row0)), lane_(lane) {
    if (kHalves) return;
    group_ = block / group_blocks();
    left_ = group_blocks() - block % group_blocks();
    next_zeros_ = load_zeros(args, at(group_));
    if (kScalesAhead) next_scales_ = load_scales(args, at(group_));
    begin_group();
  }

  // Adds a block. read_x(tile, keep, b) gives B of a tile of rows, or zeros if this lane's k is not
  // to be kept. `last`: no block follows.
  template <class ReadX>
  OW_DEVICE void add(int block, const uint4 (&pieces)[kPieces<kBits>], bool last,
                     const ReadX& read_x) {
    const int t = lane_ % 4;
    if constexpr (kHalves) {
      // A group is the k of two lanes in four: a product for each, with zeros in the others.
      set_zeros(load_zeros(args_, at(2 * block + t / 2)));
      const Fragments<X> fragments = unpack<X, kBits>(t, pieces, zeros_);
      OW_NO_UNROLL
      for (int half = 0; half < 2; ++half) {
        group_ = 2 * block + half;
        set_zeros(load_zeros(args_, at(group_)));
        scales_ = load_scales(args_, at(group_));
        multiply(fragments, t / 2 == half, read_x);
        end_group();
      }
    } else {
      multiply(unpack<X, kBits>(t, pieces, zeros_), true, read_x);
      if (--left_ != 0 && !last) return;
      end_group();
      ++group_;
      left_ = group_blocks();
      begin_group();
    }
  }

  // To totals [row][kTotalsRow], at the first output of the panel.
  template <int kOutputs>
  OW_DEVICE void store(float* totals) const {
    OW_UNROLL
    for (int j = 0; j < kTiles / kDigits; ++j) {
      OW_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = j * kRowTile + lane_ % 4 * 2 + i;
        *reinterpret_cast<uint4*>(totals + row * kTotalsRow<kOutputs> + lane_ / 4 * 4) = {
            float_to_bits(total_[j][0][i]), float_to_bits(total_[j][0][i + 2]),
            float_to_bits(total_[j][1][i]), float_to_bits(total_[j][1][i + 2])};
      }
    }
  }

 private:
  using Sum = typename Operand<X>::Sum;
  // Where one tile leaves the registers: a group of 32 is over before its scales have come.
  static constexpr bool kScalesAhead = kTiles == 1 && !kHalves;
  // Zero points that a signed byte has no room for.
  static constexpr bool kSumsX = sizeof(X) == 1 && kBits == 8;

  OW_DEVICE int group_blocks() const {
    return int((args_.groups == 1 ? args_.k_padded : args_.group_size) / kBlockK);
  }
  OW_DEVICE int64_t at(int group) const { return group_at(args_, panel_, group, lane_); }

  OW_DEVICE void set_zeros(uint32_t bytes) {
    OW_UNROLL
    for (int i = 0; i < 4; ++i) zeros_[i] = bytes >> (8 * i) & 255;
  }
  // Zero points are needed at once, and loaded a group ahead; scales at the end of the group.
  OW_DEVICE void begin_group() {
    set_zeros(next_zeros_);
    next_zeros_ = load_zeros(args_, at(group_ + 1));
    if (kScalesAhead) {
      scales_ = next_scales_;
      next_scales_ = load_scales(args_, at(group_ + 1));
    } else {
      scales_ = load_scales(args_, at(group_));
    }
  }

  template <class ReadX>
  OW_DEVICE void multiply(const Fragments<X>& fragments, bool keep, const ReadX& read_x) {
    OW_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      uint32_t b[2 * kSteps];
      read_x(j, keep, b);
      OW_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        OW_UNROLL
        for (int r = 0; r < 2; ++r) mma(X{}, sum_[j][r], fragments.a[s][r], b[2 * s], b[2 * s + 1]);
      }
      if constexpr (kSumsX) {
        constexpr uint32_t kOnes[4] = {kByteOnes, kByteOnes, kByteOnes, kByteOnes};
        if (args_.w_zeros != nullptr) mma(X{}, x_sum_[j], kOnes, b[0], b[1]);
      }
    }
  }

  // The exact sum of the group, or of its blocks so far, as a float.
  OW_DEVICE float sum_of(int j, int i) {
    Sum sum = sum_[j][i / 4][i % 4];
    if constexpr (kSumsX) {
      sum -= (int(zeros_[i / 2]) - 128) * x_sum_[j][i % 2];
    }
    return float(sum);
  }

  OW_DEVICE void end_group() {
    float scales[4];
    scales_of(scales_, args_.w_scales_type, scales);
    OW_UNROLL
    for (int j = 0; j < kTiles / kDigits; ++j) {
      OW_UNROLL
      for (int i = 0; i < 8; ++i) {
        float sum = sum_of(j * kDigits, i);
        if constexpr (kDigits == 3) {
          const float low = __builtin_fmaf(sum_of(3 * j + 1, i), 256.0f, sum_of(3 * j + 2, i));
          sum = __builtin_fmaf(sum, 65536.0f, low) * x_scale(j, i % 2);
        }
        float& total = total_[j][i / 4][i % 4];
        total = __builtin_fmaf(sum, scales[i / 2], total);
      }
    }
    OW_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      OW_UNROLL
      for (int i = 0; i < 8; ++i) sum_[j][i / 4][i % 4] = 0;
      OW_UNROLL
      for (int i = 0; i < 4; ++i) x_sum_[j][i] = 0;
    }
  }

  OW_DEVICE float x_scale(int j, int i) const {
    const int64_t row = min_of(int64_t{row0_} + j * kRowTile + lane_ % 4 * 2 + i, args_.m - 1);
    return args_.x_scales[row * args_.groups + min_of(group_, args_.groups - 1)];
  }

  const LowbitGemmArgs& args_;
  int panel_, row0_, lane_;
  int group_ = 0, left_ = 0;  // blocks of the group
  uint32_t zeros_[4] = {};
  uint32_t next_zeros_ = 0;
  uint4 scales_{}, next_scales_{};
  Sum sum_[kTiles][2][4] = {};
  int x_sum_[kTiles][4] = {};
  float total_[kTiles / kDigits][2][4] = {};
};

// The row of x, or of its digits, that is row `row` of the tiles from row0 on. Past the last, that
// one again; what comes of it is not written.
template <int kDigits>
OW_DEVICE int64_t x_row(const LowbitGemmArgs& args, int64_t row0, int row) {
  const int tile = row / kRowTile;
  const int64_t i = min_of(row0 + tile / kDigits * kRowTile + row % kRowTile, args.m - 1);
  return i * kDigits + tile % kDigits;
}

}  // namespace ow
