#include "kernels/activations/activations.h"

namespace ow {
namespace {

constexpr KernelEntry<const ActivationKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_ACTIVATIONS_KERNELS(OW_ROW)
#undef OW_ROW
};

// Below this many elements waking a thread costs more than it saves (about 2 us).
constexpr int64_t kElementsPerTask = 16384;

template <class Fn, class Args>
void run_rows(Fn fn, const Args& args, int64_t rows, int64_t row_size, const Parallel& parallel) {
  const int64_t tasks =
      min_of(min_of(parallel.threads, rows), div_up(rows * row_size, kElementsPerTask));
  parallel.for_each(tasks, [&](int64_t i) { fn(args, rows * i / tasks, rows * (i + 1) / tasks); });
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Isa isa, const Parallel& parallel) {
  run_rows(pick(kTable, isa, 0, args.m).fn->rms_norm, args, args.m, args.d, parallel);
}
void silu_mul(const SiluMulArgs& args, Isa isa, const Parallel& parallel) {
  run_rows(pick(kTable, isa, 0, args.m).fn->silu_mul, args, args.m, args.d, parallel);
}
void rope(const RopeArgs& args, Isa isa, const Parallel& parallel) {
  const int64_t rows = args.b * args.t;
  run_rows(pick(kTable, isa, 0, rows).fn->rope, args, rows, args.h * args.d, parallel);
}

}  // namespace ow
