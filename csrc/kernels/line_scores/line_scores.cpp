#include "kernels/line_scores/line_scores.h"

namespace ow {
namespace {

constexpr KernelEntry<LineScoresFn> kTable[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_LINE_SCORES_KERNELS(OW_ROW)
#undef OW_ROW
};

int64_t units_of(const LineScoresArgs& a) { return a.queries.count * a.heads; }

int64_t tasks_of(const LineScoresArgs& a, const Parallel& parallel) {
  return min_of(parallel.threads, units_of(a));
}

}  // namespace

int64_t line_scores_scratch(const LineScoresArgs& args, const Parallel& parallel) {
  return tasks_of(args, parallel) * scratch_of_task(args);
}

void line_scores(const LineScoresArgs& args, Isa isa, const Parallel& parallel) {
  const LineScoresFn fn = pick(kTable, isa, probe_key(args.type), args.probes).fn;
  const int64_t units = units_of(args);
  const int64_t tasks = tasks_of(args, parallel);
  parallel.for_each(tasks, [&](int64_t i) {
    fn(args, args.scratch + i * scratch_of_task(args), units * i / tasks, units * (i + 1) / tasks);
  });
}

}  // namespace ow
