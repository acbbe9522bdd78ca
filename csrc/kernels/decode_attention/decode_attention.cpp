#include "kernels/decode_attention/decode_attention.h"

namespace ow {
namespace {

constexpr KernelEntry<const DecodeAttentionKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_DECODE_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
};

// Multiply-adds of scores below which another thread costs more than it saves (about 4 us).
constexpr int64_t kWorkPerTask = 1 << 16;

template <class Fn>
void run(Fn fn, const DecodeAttentionArgs& args, int64_t units, int64_t work,
         const Parallel& parallel) {
  const int64_t tasks = min_of(min_of(parallel.threads, units), div_up(work, kWorkPerTask));
  parallel.for_each(tasks,
                    [&](int64_t i) { fn(args, units * i / tasks, units * (i + 1) / tasks); });
}

}  // namespace

int64_t decode_attention_state_count(const DecodeAttentionArgs& args) {
  return items_of(args) * spans_of(args) * rows_of(args) * state_size(args);
}

void decode_attention(const DecodeAttentionArgs& args, Isa isa, const Parallel& parallel) {
  const DecodeAttentionKernels& kernels = *pick(kTable, isa, 0, rows_of(args)).fn;
  const int64_t products = items_of(args) * rows_of(args) * args.d;
  run(kernels.attend, args, items_of(args) * spans_of(args), products * args.n, parallel);
  run(kernels.merge, args, items_of(args), products * spans_of(args), parallel);
}

}  // namespace ow
