#include "kernels/hadamard/hadamard.h"

namespace ow {
namespace {

constexpr KernelEntry<HadamardFn> kTable[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_HADAMARD_KERNELS(OW_ROW)
#undef OW_ROW
};

// Elements below which another thread costs more than it saves (about 2 us).
constexpr int64_t kElementsPerTask = 1 << 14;

}  // namespace

void hadamard(const HadamardArgs& args, Isa isa, const Parallel& parallel) {
  const HadamardFn fn = pick(kTable, isa, 0, args.blocks).fn;
  const int64_t tasks = min_of(min_of(parallel.threads, args.blocks),
                               div_up(args.blocks * args.block, kElementsPerTask));
  parallel.for_each(
      tasks, [&](int64_t i) { fn(args, args.blocks * i / tasks, args.blocks * (i + 1) / tasks); });
}

}  // namespace ow
