// Unstructured sparse products, the sampled product of their gradient, and their drivers.
#include <math.h>

#include "kernels/sparse_gemm/sparse_gemm.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<const SparseGemmKernel*> kSparse[] = {
#define OW_ROW(isa, key, max_m, kernel) {#kernel, Isa::isa, key, max_m, &kernel},
    OW_SPARSE_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};
const KernelEntry<const SampledGemmKernel*> kSampled[] = {
#define OW_ROW(isa, key, max_m, kernel) {#kernel, Isa::isa, key, max_m, &kernel},
    OW_SAMPLED_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};

constexpr ValueType kValueTypes[] = {ValueType::f32, ValueType::bf16, ValueType::i8};

// A weight of which about `eighths` / 8 is stored, and its operands.
struct Problem {
  int64_t m, n, k;
  ValueType type;
  FloatType y_type;
  std::vector<double> dense;  // [n, k]
  Layout layout;
  std::vector<uint64_t> index;  // of either layout: words are aligned as masks must be
  std::vector<int32_t> offsets;
  Bytes values, x, bias, add;
  std::vector<float> scales;

  Problem(int64_t m_, int64_t n_, int64_t k_, int64_t eighths, int variant, Layout layout_)
      : m(m_),
        n(n_),
        k(k_),
        type(kValueTypes[variant % 3]),
        y_type(kTypes[variant / 3 % 3]),
        layout(layout_) {
    Bytes keep, weight;
    for (int64_t i = 0; i < n * k; ++i) {
      keep.push_back(rng.below(8) < eighths);
      if (type == ValueType::i8) {
        weight.push_back(uint8_t(rng.next()));
      } else {
        append(&weight, type == ValueType::f32 ? FloatType::f32 : FloatType::bf16, rng.uniform());
      }
    }
    SparsePattern w = sparse_pattern(n, k, layout);
    offsets.resize(size_t(w.panels * w.k_blocks));
    w.offsets = offsets.data();
    const SparsePackArgs pack{n, k, type, weight.data(), keep.data()};
    const int64_t nnz = sparse_offsets_of(pack, w, offsets.data(), serial_parallel());
    index.resize(size_t(div_up(index_bytes_of(w, nnz), 8)));
    sparse_index_of(pack, w, index.data(), serial_parallel());
    values.resize(size_t((nnz + block_size_of(w)) * value_size(type)));
    sparse_values_of(pack, pattern(), values.data(), serial_parallel());
    for (int64_t i = 0; i < n; ++i) scales.push_back(rng.uniform());
    for (int64_t i = 0; i < n * k; ++i) {
      const double value =
          type == ValueType::i8
              ? double(int8_t(weight[size_t(i)]))
              : read(weight.data(), type == ValueType::f32 ? FloatType::f32 : FloatType::bf16, i);
      dense.push_back(keep[size_t(i)] ? value * scales[size_t(i / k)] : 0.0);
    }
    x = floats(m * k, y_type, 1.0f);
    bias = floats(n, y_type, 1.0f);
    add = floats(m * n, y_type, 1.0f);
  }

  SparsePattern pattern() const {
    SparsePattern w = sparse_pattern(n, k, layout);
    set_index(&w, index.data());
    w.offsets = offsets.data();
    return w;
  }
  SparseGemmArgs args() const {
    SparseGemmArgs a{};
    a.m = m;
    a.w = pattern();
    a.nnz = int64_t(values.size()) / value_size(type) - block_size_of(a.w);
    a.values = values.data();
    a.value_type = type;
    a.scales = scales.data();
    a.bias = bias.data();
    a.add = add.data();
    a.y_type = y_type;
    return a;
  }
  // Its bytes, guarded, or as many that belong to other values.
  void place_index(SparsePattern* w, int64_t nnz, bool torn, Guarded* memory) const {
    Bytes bytes(size_t(index_bytes_of(*w, nnz)), 0xff);
    if (!torn) memcpy(bytes.data(), index.data(), bytes.size());
    set_index(w, memory->copy(bytes));
  }
  bool right(const void* y) const {
    for (int64_t i = 0; i < m * n; ++i) {
      double sum = read(bias.data(), y_type, i % n) + read(add.data(), y_type, i);
      double size = fabs(sum) + 2.0;
      for (int64_t j = 0; j < k; ++j) {
        const double term = dense[size_t(i % n * k + j)] * read(x.data(), y_type, i / n * k + j);
        sum += term;
        size += fabs(term);
      }
      const double error = double(k + 4) * 0x1p-24 * size;
      const double bound = error + double(roundoff(y_type)) * (fabs(sum) + error) + 0x1p-25;
      if (!(fabs(double(read(y, y_type, i)) - sum) <= bound)) return false;
    }
    return true;
  }
};

void check_kernel(const KernelEntry<const SparseGemmKernel*>& entry, const Problem& p, bool torn,
                  Guarded* memory) {
  running = entry.name;
  const int64_t widest = entry.fn->widest;
  for (const Against side : kSides) {
    memory->restart(side);
    SparseGemmArgs a = p.args();
    const int64_t k_padded = k_padded_of(a.w);
    std::vector<float> x(size_t(sparse_x_count(p.m, k_padded, widest)));
    entry.fn->prepare({p.x.data(), p.y_type, p.m, p.k, k_padded, widest, x.data()}, 0, k_padded);
    // An index that belongs to other values chooses wrong ones, but none outside of the tensor.
    p.place_index(&a.w, a.nnz, torn, memory);
    a.w.offsets = memory->copy(p.offsets);
    a.values = memory->copy(p.values);
    a.scales = memory->copy(p.scales);
    a.bias = memory->copy(p.bias);
    a.add = memory->copy(p.add);
    a.x = memory->copy(x);
    a.y = memory->empty<uint8_t>(p.add.size());
    const int64_t half = a.w.panels / 2;
    float* tile = memory->empty<float>(size_t((a.w.panels - half) * kSparsePanel * widest));
    entry.fn->run(a, half, a.w.panels, tile);
    entry.fn->run(a, 0, half, tile);
    CHECK(torn || p.right(a.y), "%s: m %d, n %d, k %d, values %d, type %d differs", entry.name,
          int(p.m), int(p.n), int(p.k), int(p.type), int(p.y_type));
    CHECK(memory->intact(), "%s: wrote outside of y or tile", entry.name);
  }
}

void check_sampled(const KernelEntry<const SampledGemmKernel*>& entry, const Problem& p,
                   Guarded* memory) {
  running = entry.name;
  const int64_t widest = entry.fn->widest;
  const SparsePattern w = p.pattern();
  const int64_t n_padded = w.panels * kSparsePanel;
  std::vector<float> g(size_t(sparse_x_count(p.m, n_padded, widest)));
  std::vector<float> x(size_t(sparse_x_count(p.m, k_padded_of(w), widest)));
  const int64_t k_padded = k_padded_of(w);
  entry.fn->prepare({p.add.data(), p.y_type, p.m, p.n, n_padded, widest, g.data()}, 0, n_padded);
  entry.fn->prepare({p.x.data(), p.y_type, p.m, p.k, k_padded, widest, x.data()}, 0, k_padded);
  for (const Against side : kSides) {
    memory->restart(side);
    SampledGemmArgs a{p.m, w, memory->copy(g), memory->copy(x), nullptr};
    p.place_index(&a.w, p.args().nnz, false, memory);
    a.w.offsets = memory->copy(p.offsets);
    const size_t count = p.values.size() / size_t(value_size(p.type));
    a.grad = memory->empty<float>(count);
    memset(a.grad, 0, count * sizeof(float));
    entry.fn->run(a, w.panels / 2, w.panels);
    entry.fn->run(a, 0, w.panels / 2);
    std::vector<float> dense(size_t(p.n * p.k));
    expand_sparse(a.w, ValueType::f32, a.grad, dense.data(), serial_parallel());
    bool same = true;
    for (int64_t i = 0; i < p.n * p.k; ++i) {
      double sum = 0.0;
      for (int64_t t = 0; t < p.m; ++t) {
        sum += double(read(p.add.data(), p.y_type, t * p.n + i / p.k)) *
               read(p.x.data(), p.y_type, t * p.k + i % p.k);
      }
      // Elements that are stored with the value 0 stay unchecked.
      if (p.dense[size_t(i)] == 0.0) continue;
      same &= fabs(dense[size_t(i)] - sum) <= double(p.m + 4) * 0x1p-24 * double(p.m);
    }
    CHECK(same, "%s: m %d, n %d, k %d differs", entry.name, int(p.m), int(p.n), int(p.k));
    CHECK(memory->intact(), "%s: wrote outside of grad", entry.name);
  }
}

void check_drivers(Layout layout) {
  const Problem p(20, 100, 300, 4, 0, layout);
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    const auto run = [&](const Parallel& parallel) {
      SparseGemmArgs a = p.args();
      Bytes y(p.add.size(), Guarded::kPoison);
      a.y = y.data();
      std::vector<float> scratch(size_t(sparse_gemm_scratch(a, Isa(tier), parallel.threads)));
      sparse_gemm(a, p.x.data(), Isa(tier), scratch.data(), parallel);
      SampledGemmArgs s{p.m, p.pattern(), nullptr, nullptr, nullptr};
      std::vector<float> grad(p.values.size() / 4);
      s.grad = grad.data();
      scratch.resize(size_t(sampled_gemm_scratch(p.m, s.w, Isa(tier))));
      sampled_gemm(s, p.add.data(), p.x.data(), p.y_type, Isa(tier), scratch.data(), parallel);
      for (const float value : grad) append(&y, FloatType::f32, value);
      return y;
    };
    const Bytes whole = run(serial_parallel());
    for (const int64_t threads : {2, 3, 7}) {
      CHECK(run(reversed_parallel(threads)) == whole, "sparse_gemm: %s: depends on %d threads",
            isa_name(Isa(tier)), int(threads));
    }
  }
}

}  // namespace

void check_sparse_gemm(Guarded* memory) {
  constexpr int64_t kRows[] = {1, 2, 3, 7, 15, 16, 17, 33, 65, 129};
  constexpr int64_t kSizes[][2] = {{1, 1}, {16, 64}, {15, 63}, {17, 65}, {50, 200}, {16, 256}};
  int variant = 0;
  for (const Layout layout : {Layout::bitmask_n16k64, Layout::bytes_n16k256}) {
    for (const int64_t m : kRows) {
      for (const auto& size : kSizes) {
        for (const int64_t eighths : {0, 1, 4, 8}) {
          const Problem p(m, size[0], size[1], eighths, variant++, layout);
          for (const auto& entry : kSparse) {
            if (entry.isa > detected_isa() || m > entry.max_m) continue;
            if (entry.key != int32_t(layout)) continue;
            check_kernel(entry, p, false, memory);
            if (eighths == 1) check_kernel(entry, p, true, memory);
          }
          for (const auto& entry : kSampled) {
            if (entry.isa <= detected_isa() && m < 64) check_sampled(entry, p, memory);
          }
        }
      }
    }
    check_drivers(layout);
  }
}

}  // namespace ow::testing
