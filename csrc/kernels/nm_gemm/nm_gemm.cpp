#include "kernels/nm_gemm/nm_gemm.h"

namespace ow {
namespace {

constexpr KernelEntry<const NmGemmKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_NM_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};

// Multiply-adds, and numbers laid out, below which another thread costs more than it saves (about
// 4 us).
constexpr int64_t kWorkPerTask = 1 << 17;
constexpr int64_t kLaidPerTask = 1 << 14;

const NmGemmKernels& kernels_for(const NmGemmArgs& args, Isa isa) {
  const int32_t key = nm_key(layout_for_bits(LayoutFamily::nm, args.bits)->id, args.int8);
  // Of few rows weights are read once, in their order, by the rows kernel of avx512.
  const Isa most = args.m < kNmPairsMinM && isa > Isa::avx512 ? Isa::avx512 : isa;
  return *pick(kTable, nm_tier(args, most), key, args.m).fn;
}

}  // namespace

int64_t nm_laid_bytes(const NmGemmArgs& args, Isa isa) {
  return kernels_for(args, isa).laid_bytes(args);
}

void nm_gemm(const NmGemmArgs& args, Isa isa, const Parallel& parallel) {
  const NmGemmKernels& kernels = kernels_for(args, isa);
  const int64_t blocks = div_up(args.m, kernels.row_block);
  const int64_t laying =
      min_of(min_of(parallel.threads, blocks), div_up(args.m * args.k, kLaidPerTask));
  parallel.for_each(laying, [&](int64_t i) {
    kernels.lay_out(args, blocks * i / laying, blocks * (i + 1) / laying);
  });
  const int64_t panels = div_up(args.n, kNmPanel);
  const int64_t work = args.m * args.n * nm_slots(args.k, args.kept, args.block);
  const int64_t tasks = min_of(min_of(parallel.threads, panels), div_up(work, kWorkPerTask));
  parallel.for_each(tasks, [&](int64_t i) {
    kernels.multiply(args, panels * i / tasks, panels * (i + 1) / tasks);
  });
}

}  // namespace ow
