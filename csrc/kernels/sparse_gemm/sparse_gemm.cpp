#include "kernels/sparse_gemm/sparse_gemm.h"

#include <algorithm>

namespace ow {
namespace {

constexpr KernelEntry<const SparseGemmKernel*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernel) {#kernel, Isa::isa, key, max_m, &kernel},
    OW_SPARSE_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};
constexpr KernelEntry<const SampledGemmKernel*> kSampledTable[] = {
#define OW_ROW(isa, key, max_m, kernel) {#kernel, Isa::isa, key, max_m, &kernel},
    OW_SAMPLED_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};

// Elements of a dense weight (stored or not) times rows, below which a second thread costs more
// than it saves: about 4 us of work at the rates that these kernels skip zeros.
constexpr int64_t kWorkPerTask = 1 << 17;
// Elements of x for the same.
constexpr int64_t kElementsPerTask = 1 << 14;

// Cycles that the mask of a row of a block takes, d being the share of stored elements, measured on
// a Zen 4 server: to select from one row of x 10, or 20 where more than 16 values are usual; to
// expand 9 + 6.3 m; to visit the values, for up to 16 rows, 12 + 125 d.
const SparseGemmKernel& choose(const SparseGemmArgs& a, Isa isa) {
  if (a.w.bytes != nullptr) return *pick(kTable, isa, kBytes, a.m).fn;
  const int64_t all = a.w.n * a.w.k;
  const bool select = a.m <= kSelectMaxRows && 5 * a.nnz < all;
  const bool expand = a.m <= kExpandMaxRows && (2 * a.m - 1) * all < 40 * a.nnz;
  const int64_t rows =
      select ? a.m : std::max<int64_t>(a.m, (expand ? kSelectMaxRows : kExpandMaxRows) + 1);
  return *pick(kTable, isa, kMasks, rows).fn;
}

int64_t task_count(const SparsePattern& w, int64_t m, int64_t threads) {
  return min_of(min_of(threads, w.panels), div_up(m * w.n * w.k, kWorkPerTask));
}

int64_t tile_count(const SparsePattern& w, int64_t tasks, int64_t widest) {
  return min_of(kTileRows, div_up(w.panels, tasks) * kSparsePanel) * widest;
}

void prepare_x(PrepareFn prepare, const SparseXArgs& a, const Parallel& parallel) {
  const int64_t pieces = a.k_padded / 16;
  const int64_t tasks =
      min_of(min_of(parallel.threads, pieces), div_up(a.m * a.k_padded, kElementsPerTask));
  parallel.for_each(tasks, [&](int64_t i) {
    prepare(a, pieces * i / tasks * 16, pieces * (i + 1) / tasks * 16);
  });
}

}  // namespace

int64_t sparse_x_count(int64_t m, int64_t k_padded, int64_t widest) {
  if (widest == 0) return m * k_padded;
  const int64_t full = m / widest * widest;
  const int64_t rest = m - full;
  return (full + (rest > 0 ? min_of(widest, token_width(rest)) : 0)) * k_padded;
}

int64_t sparse_gemm_scratch(const SparseGemmArgs& args, Isa isa, int64_t threads) {
  const SparseGemmKernel& kernel = choose(args, isa);
  const int64_t tasks = task_count(args.w, args.m, threads);
  return sparse_x_count(args.m, k_padded_of(args.w), kernel.widest) +
         tasks * tile_count(args.w, tasks, kernel.widest);
}

void sparse_gemm(SparseGemmArgs args, const void* x, Isa isa, float* scratch,
                 const Parallel& parallel) {
  const SparseGemmKernel& kernel = choose(args, isa);
  const int64_t k_padded = k_padded_of(args.w);
  prepare_x(kernel.prepare, {x, args.y_type, args.m, args.w.k, k_padded, kernel.widest, scratch},
            parallel);
  args.x = scratch;
  float* tiles = scratch + sparse_x_count(args.m, k_padded, kernel.widest);
  const int64_t tasks = task_count(args.w, args.m, parallel.threads);
  const int64_t tile = tile_count(args.w, tasks, kernel.widest);
  parallel.for_each(tasks, [&](int64_t i) {
    kernel.run(args, args.w.panels * i / tasks, args.w.panels * (i + 1) / tasks, tiles + i * tile);
  });
}

int64_t sampled_gemm_scratch(int64_t m, const SparsePattern& w, Isa isa) {
  const int64_t widest = pick(kSampledTable, isa, 0, m).fn->widest;
  const int64_t n_padded = w.panels * kSparsePanel;
  return sparse_x_count(m, n_padded, widest) + sparse_x_count(m, k_padded_of(w), widest);
}

void sampled_gemm(SampledGemmArgs args, const void* g, const void* x, FloatType type, Isa isa,
                  float* scratch, const Parallel& parallel) {
  const SampledGemmKernel& kernel = *pick(kSampledTable, isa, 0, args.m).fn;
  const SparsePattern& w = args.w;
  const int64_t n_padded = w.panels * kSparsePanel;
  float* x_out = scratch + sparse_x_count(args.m, n_padded, kernel.widest);
  prepare_x(kernel.prepare, {g, type, args.m, w.n, n_padded, kernel.widest, scratch}, parallel);
  prepare_x(kernel.prepare, {x, type, args.m, w.k, k_padded_of(w), kernel.widest, x_out}, parallel);
  args.g = scratch;
  args.x = x_out;
  const int64_t tasks = task_count(w, args.m, parallel.threads);
  parallel.for_each(tasks, [&](int64_t i) {
    kernel.run(args, w.panels * i / tasks, w.panels * (i + 1) / tasks);
  });
}

}  // namespace ow
