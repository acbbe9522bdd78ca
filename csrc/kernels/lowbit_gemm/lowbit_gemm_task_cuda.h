// A launch of the kernels: what they share of cutting the result into tiles and writing it.
#pragma once

#include "cuda/device.h"

#include "cuda/stripes.h"
#include "kernels/lowbit_gemm/lowbit_gemm_cuda.h"

namespace ow {

constexpr int kRowTile = 8;  // rows of x that an instruction takes
constexpr int kBlockK = 32;  // k of a block, the step of a warp

// A launch: tiles of the result, those of the same outputs next to each other, over blocks of k.
struct LowbitGemmTask {
  LowbitGemmArgs args;
  Stripes stripes;
  int64_t row_tiles;
  float* parts;  // [part_count(stripes)][tile]
};

OW_DEVICE void write_output(const LowbitGemmArgs& args, int64_t i, int64_t n, float value) {
  if (args.digits == 1) value *= args.x_scales[i];
  if (args.bias != nullptr) value += read_float(args.bias, args.y_type, n);
  if (args.add != nullptr) value += read_float(args.add, args.y_type, i * args.n + n);
  write_float(args.y, args.y_type, i * args.n + n, value);
}

// Floats of a row of totals in shared memory: lanes that write four outputs of it at once, and of
// every second row after it, meet no bank twice.
template <int kOutputs>
constexpr int kTotalsRow = kOutputs + 4;

// Sums kShares totals [kRows][kTotalsRow] of a segment into y, or into a part if its tile is cut.
template <int kShares, int kRows, int kOutputs>
OW_DEVICE void write_tile(const LowbitGemmTask& task, const Segment& segment, const float* totals) {
  const LowbitGemmArgs& args = task.args;
  const bool whole = is_whole(task.stripes, segment);
  constexpr int kSize = kRows * kOutputs;
  constexpr int kShareSize = kRows * kTotalsRow<kOutputs>;
  float* part = task.parts + part_of(task.stripes, blockIdx.x, segment.tile) * kSize;
  const int64_t i0 = segment.tile % task.row_tiles * kRows;
  const int64_t n0 = segment.tile / task.row_tiles * kOutputs;
  for (int at = int(threadIdx.x); at < kSize; at += int(blockDim.x)) {
    const int64_t i = i0 + at / kOutputs;
    const int64_t n = n0 + at % kOutputs;
    if (i >= args.m || n >= args.n) continue;
    float value = 0.0f;
    const float* total = totals + at / kOutputs * kTotalsRow<kOutputs> + at % kOutputs;
    for (int share = 0; share < kShares; ++share) value += total[share * kShareSize];
    if (whole) {
      write_output(args, i, n, value);
    } else {
      part[at] = value;
    }
  }
}

struct LowbitGemmShape {
  int rows, outputs;  // of a tile
  int step_blocks;    // of k
  int least_steps;    // worth a block of threads
  int blocks;         // that a multiprocessor holds
};

// Whether a block is two groups.
OW_INLINE bool has_halves(const LowbitGemmArgs& args) {
  return args.groups > 1 && args.group_size < kBlockK;
}

// lowbit_gemm_rows.cu and lowbit_gemm_tile.cu.
constexpr LowbitGemmShape kRowsShape = {kRowTile, int(kPanel), 1, 8, 2};
constexpr LowbitGemmShape kTileShape16 = {16, 128, 2, 4, 4};
constexpr LowbitGemmShape kDigitShape16 = {16, 128, 2, 4, 3};  // three digits a row
constexpr LowbitGemmShape kTileShape64 = {64, 128, 2, 4, 2};
LaunchStatus launch_lowbit_gemm_rows(const LowbitGemmTask& task, void* stream);
LaunchStatus launch_lowbit_gemm_tile(const LowbitGemmTask& task, int rows, void* stream);

// launch.operator()<X, kDigits, kBits>() for what the task is.
template <class Launch>
LaunchStatus with_operands(const LowbitGemmArgs& args, const Launch& launch) {
  const auto with_bits = [&]<class X, int kDigits>() {
    switch (args.bits) {
      case 2: return launch.template operator()<X, kDigits, 2>();
      case 3: return launch.template operator()<X, kDigits, 3>();
      case 4: return launch.template operator()<X, kDigits, 4>();
      default: return launch.template operator()<X, kDigits, 8>();
    }
  };
  if (args.digits == 3) return with_bits.template operator()<int8_t, 3>();
  if (args.digits == 1) return with_bits.template operator()<int8_t, 1>();
  if (args.y_type == FloatType::f16) return with_bits.template operator()<f16, 1>();
  return with_bits.template operator()<bf16, 1>();
}

}  // namespace ow
