#include "kernels/paged_attention/paged_attention.h"

#include <algorithm>

namespace ow {
namespace {

constexpr KernelEntry<const PagedAttentionKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_PAGED_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
};

// Multiply-adds of scores below which another thread costs more than it saves (about 4 us).
constexpr int64_t kWorkPerTask = 1 << 16;

template <class Fn>
void run(Fn fn, const PagedAttentionArgs& args, int64_t units, int64_t work,
         const Parallel& parallel) {
  const int64_t tasks = min_of(min_of(parallel.threads, units), work / kWorkPerTask + 1);
  parallel.for_each(tasks,
                    [&](int64_t i) { fn(args, units * i / tasks, units * (i + 1) / tasks); });
}

}  // namespace

void paged_attention_plan(PagedAttentionArgs* args, int64_t* spans) {
  const int64_t items = items_of(*args);
  int64_t most = 0;
  for (int64_t item = 0; item < items; ++item) {
    most = std::max(most, listed_pages(*args, item) * args->kv.page_size);
  }
  args->span_chunks = std::clamp<int64_t>(most / kTokensPerSpan, 1, kMaxSpanChunks);
  const int64_t tokens = args->span_chunks * kChunkTokens;
  spans[0] = 0;
  for (int64_t item = 0; item < items; ++item) {
    const int64_t newest = args->kv.lengths[item] - newest_of(*args, item);
    spans[item + 1] = spans[item] + div_up(listed_pages(*args, item), tokens / args->kv.page_size) +
                      div_up(newest, tokens);
  }
  args->spans = spans;
}

int64_t paged_attention_state_count(const PagedAttentionArgs& args) {
  return args.spans[items_of(args)] * rows_of(args) * state_size(args);
}

void paged_attention(const PagedAttentionArgs& args, Isa isa, const Parallel& parallel) {
  const PagedAttentionKernels& kernels = *pick(kTable, isa, 0, rows_of(args)).fn;
  const int64_t spans = args.spans[items_of(args)];
  const int64_t row = rows_of(args) * args.kv.values.d;
  run(kernels.attend, args, spans, spans * args.span_chunks * kChunkTokens * row, parallel);
  run(kernels.merge, args, items_of(args), spans * row, parallel);
}

}  // namespace ow
