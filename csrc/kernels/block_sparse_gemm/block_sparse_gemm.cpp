#include "kernels/block_sparse_gemm/block_sparse_gemm.h"

namespace ow {
namespace {

constexpr KernelEntry<const BlockSparseGemmKernel*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernel) {#kernel, Isa::isa, key, max_m, &kernel},
    OW_BLOCK_SPARSE_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};

// Multiply-adds below which a second thread costs more than it saves: about 4 us of work.
constexpr int64_t kWorkPerTask = 1 << 18;
// Elements of x for the same.
constexpr int64_t kElementsPerTask = 1 << 14;

// Tile by tile, k [begin, end).
template <class T>
void prepare_tiles(const BlockSparseGemmArgs& a, const T* x, int64_t widest, int64_t begin,
                   int64_t end, float* out) {
  // Of k at a time: rows are read along k, and what they are spread over stays in L1.
  constexpr int64_t kStep = 64;
  for (int64_t first = 0; first < a.m; first += widest) {
    const int64_t used = min_of(widest, a.m - first);
    const int64_t rows = tile_rows(used, widest);
    float* tile = out + first * a.k_padded;
    for (int64_t step = begin; step < end; step += kStep) {
      const int64_t step_end = min_of(step + kStep, end);
      const int64_t inside = min_of(step_end, a.k);
      for (int64_t i = 0; i < rows; ++i) {
        int64_t k = step;
        if (i < used) {
          for (; k < inside; ++k) tile[k * rows + i] = to_float(x[(first + i) * a.k + k]);
        }
        for (; k < step_end; ++k) tile[k * rows + i] = 0.0f;
      }
    }
  }
}

template <class T>
void prepare(const BlockSparseGemmArgs& a, const T* x, int64_t widest, float* out,
             const Parallel& parallel) {
  const int64_t pieces = a.k_padded / 16;
  const int64_t tasks =
      min_of(min_of(parallel.threads, pieces), div_up(a.m * a.k_padded, kElementsPerTask));
  parallel.for_each(tasks, [&](int64_t i) {
    prepare_tiles(a, x, widest, pieces * i / tasks * 16, pieces * (i + 1) / tasks * 16, out);
  });
}

// Calls body(offset of the block in `values`, first row, rows, first column, columns), in elements.
template <class Body>
void for_each_block(const BlockSparsePackArgs& a, int64_t row, const Body& body) {
  const int64_t n = row * a.block;
  for (int64_t b = a.indptr[row]; b < a.indptr[row + 1]; ++b) {
    const int64_t k = a.indices[b] * a.block;
    body(b * a.block * a.block, n, min_of(a.block, a.n - n), k, min_of(a.block, a.k - k));
  }
}

}  // namespace

int64_t block_sparse_scratch(const BlockSparseGemmArgs& args, Isa isa) {
  const int64_t widest = pick(kTable, isa, 0, args.m).fn->rows;
  const int64_t full = args.m / widest * widest;
  return (full + tile_rows(args.m - full, widest)) * args.k_padded;
}

void block_sparse_gemm(BlockSparseGemmArgs args, const void* x, Isa isa, float* scratch,
                       const Parallel& parallel) {
  const BlockSparseGemmKernel& kernel = *pick(kTable, isa, 0, args.m).fn;
  switch (args.y_type) {
    case FloatType::f32:
      prepare(args, static_cast<const float*>(x), kernel.rows, scratch, parallel);
      break;
    case FloatType::bf16:
      prepare(args, static_cast<const bf16*>(x), kernel.rows, scratch, parallel);
      break;
    case FloatType::f16:
      prepare(args, static_cast<const f16*>(x), kernel.rows, scratch, parallel);
      break;
  }
  args.x = scratch;
  const int64_t blocks = args.indptr[args.row_blocks];
  const int64_t work = args.m * (blocks * args.block * args.block + args.n);
  const int64_t tasks =
      min_of(min_of(parallel.threads, args.row_blocks), div_up(work, kWorkPerTask));
  // Shares of blocks, not of rows: a pruned weight may have its blocks anywhere.
  const auto first_row = [&](int64_t task) {
    if (task == tasks) return args.row_blocks;
    int64_t row = 0;
    while (row < args.row_blocks && args.indptr[row] < blocks * task / tasks) ++row;
    return row;
  };
  parallel.for_each(tasks, [&](int64_t i) { kernel.run(args, first_row(i), first_row(i + 1)); });
}

void compress_blocks(const BlockSparsePackArgs& a, const void* weight, void* values,
                     const Parallel& parallel) {
  const uint8_t* from = static_cast<const uint8_t*>(weight);
  uint8_t* to = static_cast<uint8_t*>(values);
  parallel.for_each(a.row_blocks, [&](int64_t row) {
    for_each_block(a, row, [&](int64_t at, int64_t n, int64_t rows, int64_t k, int64_t columns) {
      memset(to + at * a.size, 0, size_t(a.block * a.block * a.size));
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          memcpy(to + (at + c * a.block + r) * a.size, from + ((n + r) * a.k + k + c) * a.size,
                 size_t(a.size));
        }
      }
    });
  });
}

void expand_blocks(const BlockSparsePackArgs& a, const void* values, void* weight,
                   const Parallel& parallel) {
  const uint8_t* from = static_cast<const uint8_t*>(values);
  uint8_t* to = static_cast<uint8_t*>(weight);
  parallel.for_each(a.row_blocks, [&](int64_t row) {
    const int64_t begin = row * a.block;
    memset(to + begin * a.k * a.size, 0, size_t(min_of(a.block, a.n - begin) * a.k * a.size));
    for_each_block(a, row, [&](int64_t at, int64_t n, int64_t rows, int64_t k, int64_t columns) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          memcpy(to + ((n + r) * a.k + k + c) * a.size, from + (at + c * a.block + r) * a.size,
                 size_t(a.size));
        }
      }
    });
  });
}

}  // namespace ow
