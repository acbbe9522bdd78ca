#include "kernels/quantize/quantize.h"

namespace ow {
namespace {

constexpr KernelEntry<EncodeFn> kTable[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_QUANTIZE_KERNELS(OW_ROW)
#undef OW_ROW
};

// Below this many elements waking a thread costs more than it saves (about 2 us).
constexpr int64_t kElementsPerTask = 16384;

}  // namespace

void encode_rows(const EncodeArgs& args, Isa isa, const Parallel& parallel) {
  const EncodeFn fn = pick(kTable, isa, 0, args.m).fn;
  const int64_t rows_per_task = div_up(kElementsPerTask, args.k > 0 ? args.k : 1);
  const int64_t tasks = min_of(parallel.threads, div_up(args.m, rows_per_task));
  parallel.for_each(tasks,
                    [&](int64_t i) { fn(args, args.m * i / tasks, args.m * (i + 1) / tasks); });
}

}  // namespace ow
