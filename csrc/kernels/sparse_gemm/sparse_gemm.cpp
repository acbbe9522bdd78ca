#include "kernels/sparse_gemm/sparse_gemm.h"

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

int64_t task_count(const SparsePattern& w, int64_t m, int64_t threads) {
  return min_of(min_of(threads, w.panels), div_up(m * w.n * w.k, kWorkPerTask));
}

int64_t tile_count(const SparsePattern& w, int64_t tasks, int64_t widest) {
  return min_of(kTileRows, div_up(w.panels, tasks) * kSparsePanel) * widest;
}

// Row i of a panel of tokens, k [begin, end), to column i of out [k_padded, width].
template <class T>
void transpose_row(const T* x, int64_t begin, int64_t end, int64_t width, float* out) {
  for (int64_t k = begin; k < end; ++k) out[k * width] = to_float(x[k]);
}

template <class T>
void prepare_tokens(const T* x, int64_t m, int64_t k, int64_t k_begin, int64_t k_end,
                    int64_t k_padded, int64_t widest, float* out) {
  // Lines of the transposed panel that stay in L1 while its rows come by.
  constexpr int64_t kStep = 16;
  for_each_token_panel(m, widest, [&](int64_t first, int64_t rows, int64_t width) {
    float* panel = out + first * k_padded;
    for (int64_t begin = k_begin; begin < k_end; begin += kStep) {
      const int64_t end = min_of(begin + kStep, k_end);
      if (rows < width || end > k) {
        memset(panel + begin * width, 0, size_t((end - begin) * width) * sizeof(float));
      }
      for (int64_t i = 0; i < rows; ++i) {
        transpose_row(x + (first + i) * k, begin, min_of(end, k), width, panel + i);
      }
    }
  });
}

template <class T>
void prepare_rows(const T* x, int64_t m, int64_t k, int64_t k_begin, int64_t k_end,
                  int64_t k_padded, float* out) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = k_begin; j < k_end; ++j) {
      out[i * k_padded + j] = j < k ? to_float(x[i * k + j]) : 0.0f;
    }
  }
}

template <class T>
void prepare(const T* x, int64_t m, int64_t k, int64_t k_padded, int64_t widest, float* out,
             const Parallel& parallel) {
  const int64_t blocks = k_padded / 16;
  const int64_t tasks =
      min_of(min_of(parallel.threads, blocks), div_up(m * k_padded, kElementsPerTask));
  parallel.for_each(tasks, [&](int64_t task) {
    const int64_t begin = blocks * task / tasks * 16;
    const int64_t end = blocks * (task + 1) / tasks * 16;
    if (widest == 0) {
      prepare_rows(x, m, k, begin, end, k_padded, out);
    } else {
      prepare_tokens(x, m, k, begin, end, k_padded, widest, out);
    }
  });
}

}  // namespace

int64_t sparse_x_count(int64_t m, int64_t k_padded, int64_t widest) {
  if (widest == 0) return m * k_padded;
  const int64_t full = m / widest * widest;
  const int64_t rest = m - full;
  return (full + (rest > 0 ? min_of(widest, token_width(rest)) : 0)) * k_padded;
}

void prepare_sparse_x(const void* x, FloatType x_type, int64_t m, int64_t k, int64_t k_padded,
                      int64_t widest, float* out, const Parallel& parallel) {
  const auto typed = [&](const auto* p) { prepare(p, m, k, k_padded, widest, out, parallel); };
  switch (x_type) {
    case FloatType::f32: return typed(static_cast<const float*>(x));
    case FloatType::bf16: return typed(static_cast<const bf16*>(x));
    case FloatType::f16: return typed(static_cast<const f16*>(x));
  }
}

int64_t sparse_gemm_scratch(const SparseGemmArgs& args, Isa isa, int64_t threads) {
  const SparseGemmKernel& kernel = *pick(kTable, isa, 0, args.m).fn;
  const int64_t tasks = task_count(args.w, args.m, threads);
  return sparse_x_count(args.m, k_padded_of(args.w), kernel.widest) +
         tasks * tile_count(args.w, tasks, kernel.widest);
}

void sparse_gemm(SparseGemmArgs args, const void* x, Isa isa, float* scratch,
                 const Parallel& parallel) {
  const SparseGemmKernel& kernel = *pick(kTable, isa, 0, args.m).fn;
  const int64_t k_padded = k_padded_of(args.w);
  prepare_sparse_x(x, args.y_type, args.m, args.w.k, k_padded, kernel.widest, scratch, parallel);
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
  prepare_sparse_x(g, type, args.m, w.n, n_padded, kernel.widest, scratch, parallel);
  prepare_sparse_x(x, type, args.m, w.k, k_padded_of(w), kernel.widest, x_out, parallel);
  args.g = scratch;
  args.x = x_out;
  const int64_t tasks = task_count(w, args.m, parallel.threads);
  parallel.for_each(tasks, [&](int64_t i) {
    kernel.run(args, w.panels * i / tasks, w.panels * (i + 1) / tasks);
  });
}

}  // namespace ow
