// Which kernel, over how many blocks, and the sums of the tiles that were cut.
#include "cuda/device.h"

#include "cuda/launch.h"
#include "kernels/lowbit_gemm/lowbit_gemm_task_cuda.h"

namespace ow {
namespace {

constexpr int kThreads = 128;

LowbitGemmShape shape_for(const LowbitGemmArgs& args) {
  if (args.m <= kRowsShape.rows || has_halves(args)) return kRowsShape;
  if (args.digits == 3) return kDigitShape16;
  return args.m <= kTileShape16.rows ? kTileShape16 : kTileShape64;
}

// Blocks of threads. The parts of cut tiles take a second kernel, which beside a product of few
// rows is not short: tiles are cut where whole ones would leave much of the GPU idle. That is less
// than 7/8 of the blocks it holds at once; or, for the kernel that only waits for memory, of which
// one block a multiprocessor has enough on its way, less than 3/4 of the multiprocessors.
int64_t blocks_for(const LowbitGemmShape& shape, int64_t tiles, int64_t steps,
                   int64_t multiprocessors) {
  const int64_t held = multiprocessors * shape.blocks;
  const bool fills = 8 * tiles >= 7 * held * div_up(tiles, held);
  const bool reads = shape.rows == kRowsShape.rows && 4 * tiles >= 3 * multiprocessors;
  if (fills || reads) return tiles;
  const int64_t most = tiles * steps / shape.least_steps;
  return min_of(most > 1 ? most : 1, held);
}

LowbitGemmTask task_for(const LowbitGemmArgs& args, int multiprocessors) {
  const LowbitGemmShape shape = shape_for(args);
  const int64_t row_tiles = div_up(args.m, shape.rows);
  const int64_t tiles = div_up(args.n, shape.outputs) * row_tiles;
  const int64_t steps = div_up(args.k_padded / kBlockK, shape.step_blocks);
  const int64_t blocks = blocks_for(shape, tiles, steps, multiprocessors);
  return {args, {tiles, steps, blocks}, row_tiles, nullptr};
}

// Adds the parts of the cut tiles, a block a tile.
__global__ void __launch_bounds__(kThreads)
    lowbit_gemm_parts(const LowbitGemmTask task, int rows, int outputs) {
  const Stripes& stripes = task.stripes;
  const int64_t tile = blockIdx.x;
  const int64_t first = block_of(stripes, tile * stripes.steps);
  const int64_t last = block_of(stripes, (tile + 1) * stripes.steps - 1);
  if (first == last) return;
  const int64_t i0 = tile % task.row_tiles * rows;
  const int64_t n0 = tile / task.row_tiles * outputs;
  const int64_t first_part = part_of(stripes, first, tile);
  const int size = rows * outputs;
  for (int at = int(threadIdx.x); at < size; at += kThreads) {
    const int64_t i = i0 + at / outputs;
    const int64_t n = n0 + at % outputs;
    if (i >= task.args.m || n >= task.args.n) continue;
    float value = task.parts[first_part * size + at];
    // The stripes of the other blocks begin in this tile.
    for (int64_t block = first + 1; block <= last; ++block) {
      value += task.parts[part_at_begin(block) * size + at];
    }
    write_output(task.args, i, n, value);
  }
}

}  // namespace

int64_t lowbit_gemm_part_count(const LowbitGemmArgs& args, int multiprocessors) {
  const LowbitGemmShape shape = shape_for(args);
  const LowbitGemmTask task = task_for(args, multiprocessors);
  return has_cuts(task.stripes) ? part_count(task.stripes) * shape.rows * shape.outputs : 0;
}

LaunchStatus launch_lowbit_gemm(const LowbitGemmArgs& args, int multiprocessors, float* parts,
                                void* stream) {
  const LowbitGemmShape shape = shape_for(args);
  LowbitGemmTask task = task_for(args, multiprocessors);
  task.parts = parts;
  const LaunchStatus status = shape.rows == kRowsShape.rows
                                  ? launch_lowbit_gemm_rows(task, stream)
                                  : launch_lowbit_gemm_tile(task, shape.rows, stream);
  if (status.error != 0 || !has_cuts(task.stripes)) return status;
  return launch("lowbit_gemm_parts", lowbit_gemm_parts, dim3(unsigned(task.stripes.tiles)),
                kThreads, 0, stream, task, shape.rows, shape.outputs);
}

}  // namespace ow
