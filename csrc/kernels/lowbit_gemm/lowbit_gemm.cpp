#include "kernels/lowbit_gemm/lowbit_gemm.h"

namespace ow {
namespace {

constexpr KernelEntry<LowbitGemmFn> kTable[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_LOWBIT_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};

// Multiply-adds below which a second thread costs more than it saves: about 4 us of work.
constexpr int64_t kWorkPerTask = 1 << 18;

// Tile kernels take 64 outputs at a time; a split between tiles wastes none of one.
constexpr int64_t kPanelsPerTile = 2;

}  // namespace

int64_t lowbit_gemm_row_block(Isa isa, int64_t rows) {
  return isa < Isa::avx512 || rows <= kRowsKernelMaxRows ? rows : kTileRowBlock;
}

bool lowbit_gemm_takes_bf16(Isa isa, int64_t m) { return isa >= Isa::avx512bf16 && m >= 12; }

void lowbit_gemm(const LowbitGemmArgs& args, Isa isa, const Parallel& parallel) {
  const int32_t key = lowbit_key(layout_for_bits(args.bits)->id, args.digits == 0);
  const int64_t rows = args.m * (args.digits == 0 ? 1 : args.digits);
  const LowbitGemmFn fn = pick(kTable, isa, key, rows).fn;
  const int64_t panels = div_up(args.n, kPanel);
  const int64_t tiles = div_up(panels, kPanelsPerTile);
  const int64_t work = rows * args.n * args.k;
  const int64_t tasks = min_of(min_of(parallel.threads, tiles), div_up(work, kWorkPerTask));
  parallel.for_each(tasks, [&](int64_t i) {
    const int64_t begin = tiles * i / tasks * kPanelsPerTile;
    const int64_t end = min_of(tiles * (i + 1) / tasks * kPanelsPerTile, panels);
    fn(args, begin, end);
  });
}

}  // namespace ow
