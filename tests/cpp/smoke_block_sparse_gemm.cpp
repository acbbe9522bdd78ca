// Block-sparse products and their driver.
#include <math.h>

#include "kernels/block_sparse_gemm/block_sparse_gemm.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<const BlockSparseGemmKernel*> kBlocks[] = {
#define OW_ROW(isa, key, max_m, kernel) {#kernel, Isa::isa, key, max_m, &kernel},
    OW_BLOCK_SPARSE_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};

constexpr ValueType kValueTypes[] = {ValueType::f32, ValueType::bf16, ValueType::i8};

struct Problem {
  BlockSparseGemmArgs args{};
  Bytes weight;  // [n, k], zero where no block is
  std::vector<int32_t> indptr, indices;
  Bytes values, x, bias, add;
  std::vector<float> scales;  // of int8

  Problem(int64_t m, int64_t n, int64_t k, int64_t block, int64_t eighths, int variant) {
    args.m = m;
    args.n = n;
    args.k = k;
    args.block = block;
    args.row_blocks = div_up(n, block);
    args.k_padded = round_up(k, block);
    args.value_type = kValueTypes[variant % 3];
    args.y_type = kTypes[variant / 3 % 3];
    const int64_t size = value_size(args.value_type);
    for (int64_t r = 0; r < args.row_blocks; ++r) {
      indptr.push_back(int32_t(indices.size()));
      for (int64_t c = 0; c < args.k_padded / block; ++c) {
        if (rng.below(8) < eighths) indices.push_back(int32_t(c));
      }
    }
    indptr.push_back(int32_t(indices.size()));
    if (args.value_type == ValueType::i8) {
      for (int64_t i = 0; i < n * k; ++i) weight.push_back(uint8_t(rng.below(256)));
      for (int64_t i = 0; i < n; ++i) scales.push_back(rng.uniform());
    } else {
      const bool f32 = args.value_type == ValueType::f32;
      weight = floats(n * k, f32 ? FloatType::f32 : FloatType::bf16, 1.0f);
    }
    values.resize(indices.size() * size_t(block * block * size));
    const BlockSparsePackArgs pack{
        n, k, block, args.row_blocks, size, indptr.data(), indices.data()};
    compress_blocks(pack, weight.data(), values.data(), serial_parallel());
    expand_blocks(pack, values.data(), weight.data(), serial_parallel());
    x = floats(m * k, args.y_type, 1.0f);
    bias = floats(n, args.y_type, 1.0f);
    add = floats(m * n, args.y_type, 1.0f);
  }

  bool right(const void* y) const {
    const int64_t n = args.n;
    const int64_t k = args.k;
    for (int64_t i = 0; i < args.m * n; ++i) {
      double sum = read(bias.data(), args.y_type, i % n) + read(add.data(), args.y_type, i);
      double size = fabs(sum) + 2.0;
      for (int64_t j = 0; j < k; ++j) {
        const double w = read_value(weight.data(), args.value_type, i % n * k + j);
        const double scale = scales.empty() ? 1.0 : double(scales[size_t(i % n)]);
        const double term = scale * w * read(x.data(), args.y_type, i / n * k + j);
        sum += term;
        size += fabs(term);
      }
      const double error = double(k + 4) * 0x1p-24 * size;
      const double bound = error + double(roundoff(args.y_type)) * (fabs(sum) + error) + 0x1p-25;
      if (!(fabs(double(read(y, args.y_type, i)) - sum) <= bound)) return false;
    }
    return true;
  }
};

// x in tiles, as the kernel reads it.
std::vector<float> tiles_of(const Problem& p, int64_t widest) {
  std::vector<float> tiles;
  const BlockSparseGemmArgs& a = p.args;
  for (int64_t first = 0; first < a.m; first += widest) {
    const int64_t used = min_of(widest, a.m - first);
    const int64_t rows = tile_rows(used, widest);
    for (int64_t k = 0; k < a.k_padded; ++k) {
      for (int64_t i = 0; i < rows; ++i) {
        const bool inside = i < used && k < a.k;
        tiles.push_back(inside ? read(p.x.data(), a.y_type, (first + i) * a.k + k) : 0.0f);
      }
    }
  }
  return tiles;
}

void check_kernel(const KernelEntry<const BlockSparseGemmKernel*>& entry, const Problem& p,
                  Guarded* memory) {
  running = entry.name;
  for (const Against side : kSides) {
    memory->restart(side);
    BlockSparseGemmArgs a = p.args;
    a.indptr = memory->copy(p.indptr);
    a.indices = memory->copy(p.indices);
    a.values = memory->copy(p.values);
    if (!p.scales.empty()) a.scales = memory->copy(p.scales);
    a.bias = memory->copy(p.bias);
    a.add = memory->copy(p.add);
    a.x = memory->copy(tiles_of(p, entry.fn->rows));
    a.y = memory->empty<uint8_t>(p.add.size());
    entry.fn->run(a, a.row_blocks / 2, a.row_blocks);
    entry.fn->run(a, 0, a.row_blocks / 2);
    CHECK(p.right(a.y), "%s: m %d, n %d, k %d, block %d, type %d differs", entry.name, int(a.m),
          int(a.n), int(a.k), int(a.block), int(a.y_type));
    CHECK(memory->intact(), "%s: wrote outside of y", entry.name);
  }
}

void check_driver() {
  const Problem p(20, 300, 200, 32, 4, 0);
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    const auto run = [&](const Parallel& parallel) {
      BlockSparseGemmArgs a = p.args;
      Bytes y(p.add.size(), Guarded::kPoison);
      a.indptr = p.indptr.data();
      a.indices = p.indices.data();
      a.values = p.values.data();
      a.y = y.data();
      std::vector<float> scratch(size_t(block_sparse_scratch(a, Isa(tier))));
      block_sparse_gemm(a, p.x.data(), Isa(tier), scratch.data(), parallel);
      return y;
    };
    const Bytes whole = run(serial_parallel());
    for (const int64_t threads : {2, 3, 7}) {
      CHECK(run(reversed_parallel(threads)) == whole,
            "block_sparse_gemm: %s: depends on %d threads", isa_name(Isa(tier)), int(threads));
    }
  }
}

}  // namespace

void check_block_sparse_gemm(Guarded* memory) {
  constexpr int64_t kRows[] = {1, 2, 3, 5, 6, 7, 8, 13, 14, 15, 29};
  constexpr int64_t kSizes[][2] = {{1, 1}, {64, 64}, {63, 65}, {70, 150}};
  int variant = 0;
  for (const int64_t m : kRows) {
    for (const auto& size : kSizes) {
      for (const int64_t block : {16, 32, 64}) {
        for (const int64_t eighths : {0, 4, 8}) {
          const Problem p(m, size[0], size[1], block, eighths, variant++);
          for (const auto& entry : kBlocks) {
            if (entry.isa <= detected_isa()) check_kernel(entry, p, memory);
          }
        }
      }
    }
  }
  check_driver();
}

}  // namespace ow::testing
