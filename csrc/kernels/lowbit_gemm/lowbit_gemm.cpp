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

// Panels that a kernel takes at a time, between which a split wastes nothing: the tile kernels take
// two. One where it can be: 18 panels are 9 + 9, not 8 + 10.
int64_t split_of(const KernelEntry<LowbitGemmFn>& kernel) {
  return kernel.isa >= Isa::avx512 && kernel.max_m == kAnyM ? 2 : 1;
}

}  // namespace

int64_t lowbit_gemm_row_block(Isa isa, int64_t rows) {
  return isa < Isa::avx512 || rows <= kRowsKernelMaxRows ? rows : kTileRowBlock;
}

bool lowbit_gemm_takes_bf16(Isa isa, int64_t m) { return isa >= Isa::avx512bf16 && m >= 12; }

void lowbit_gemm(const LowbitGemmArgs& args, Isa isa, const Parallel& parallel) {
  const int32_t key =
      lowbit_key(layout_for_bits(LayoutFamily::lowbit, args.bits)->id, args.digits == 0);
  const int64_t rows = args.m * (args.digits == 0 ? 1 : args.digits);
  const KernelEntry<LowbitGemmFn>& kernel = pick(kTable, isa, key, rows);
  const int64_t panels = div_up(args.n, kPanel);
  const int64_t split = split_of(kernel);
  const int64_t pieces = div_up(panels, split);
  const int64_t work = rows * args.n * args.k;
  const int64_t tasks = min_of(min_of(parallel.threads, pieces), div_up(work, kWorkPerTask));
  parallel.for_each(tasks, [&](int64_t i) {
    const int64_t begin = pieces * i / tasks * split;
    const int64_t end = min_of(pieces * (i + 1) / tasks * split, panels);
    kernel.fn(args, begin, end);
  });
}

}  // namespace ow
