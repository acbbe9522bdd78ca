#include "kernels/merge_states/merge_states.h"

namespace ow {
namespace {

constexpr KernelEntry<MergeStatesFn> kTable[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_MERGE_STATES_KERNELS(OW_ROW)
#undef OW_ROW
};

// Elements below which another thread costs more than it saves (about 4 us).
constexpr int64_t kElementsPerTask = 1 << 14;

}  // namespace

void merge_states(const MergeStatesArgs& args, Isa isa, const Parallel& parallel) {
  const auto& kernel = pick(kTable, isa, 0, args.rows);
  const int64_t tasks = min_of(min_of(parallel.threads, args.rows),
                               div_up(args.rows * (args.d + 1), kElementsPerTask));
  parallel.for_each(tasks, [&](int64_t i) {
    kernel.fn(args, args.rows * i / tasks, args.rows * (i + 1) / tasks);
  });
}

}  // namespace ow
