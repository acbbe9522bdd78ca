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

bool unpacks_tiles(const KernelEntry<LowbitGemmFn>& kernel) {
  return kernel.isa >= Isa::avx512 && kernel.max_m == kAnyM;
}

// Panels that a kernel takes at a time, between which a split wastes nothing: the 64-output tile
// kernels take two. One where it can be: 18 panels are 9 + 9, not 8 + 10.
int64_t split_of(const KernelEntry<LowbitGemmFn>& kernel) {
  return unpacks_tiles(kernel) && kernel.isa < Isa::avx512amx ? 2 : 1;
}

int64_t row_count(int64_t m, int32_t digits) { return digits == 0 ? m : m * digits; }

// Rows of x up to which AMX gains nothing: it unpacks to the cache, and memory is the limit.
constexpr int64_t kFewForAmx = 8;

const KernelEntry<LowbitGemmFn>& kernel_for(Isa isa, int32_t key, int64_t m, int32_t digits) {
  const bool amx = isa >= Isa::avx512amx && m > kFewForAmx;
  return pick(kTable,
              amx                     ? isa
              : isa < Isa::avx512bf16 ? isa
                                      : Isa::avx512bf16,
              key, row_count(m, digits));
}

}  // namespace

RowBlocks lowbit_gemm_x_blocks(const KernelEntry<LowbitGemmFn>& kernel, int64_t m, int32_t digits,
                               int64_t k) {
  if (!unpacks_tiles(kernel)) return {row_count(m, digits), kUnit, round_up(k, kPadK)};
  if (kernel.isa < Isa::avx512amx) return {kTileRowBlock, kUnit, round_up(k, kPadK)};
  if (digits == 0) return {kAmxRows, kAmxBytes / 2, round_up(k, kAmxBytes / 2)};
  return {kAmxRows * digits, kAmxBytes, round_up(k, kAmxBytes)};
}

RowBlocks lowbit_gemm_x_blocks(Isa isa, int64_t m, int32_t digits, int64_t k) {
  // The layout of the weight makes no difference.
  const int32_t key = lowbit_key(Layout::w4_n32k8, digits == 0);
  return lowbit_gemm_x_blocks(kernel_for(isa, key, m, digits), m, digits, k);
}

bool lowbit_gemm_takes_bf16(Isa isa, int64_t m) { return isa >= Isa::avx512bf16 && m >= 12; }

void lowbit_gemm(const LowbitGemmArgs& args, Isa isa, const Parallel& parallel) {
  const int32_t key =
      lowbit_key(layout_for_bits(LayoutFamily::lowbit, args.bits)->id, args.digits == 0);
  const int64_t rows = row_count(args.m, args.digits);
  const KernelEntry<LowbitGemmFn>& kernel = kernel_for(isa, key, args.m, args.digits);
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
