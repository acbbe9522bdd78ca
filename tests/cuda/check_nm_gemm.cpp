#include "cuda/device.h"

#include "check_family.h"
#include "cuda/launch.h"
#include "kernels/nm_gemm/nm_gemm_few_cuda.h"
#include "kernels/nm_gemm/nm_gemm_many_cuda.h"
#include "kernels/nm_gemm/nm_gemm_pack_body.h"

namespace ow::check {
namespace {

int below(int n) { return int(random_bits() % uint32_t(n)); }
// Eighths up to one: products and sums of hundreds of them are exact in fp32.
template <class T>
T eighths() {
  T value;
  from_float(float(below(17) - 8) / 8.0f, &value);
  return value;
}

// y[m,n] of a weight of eighths, or of codes with scales of 1/2, 1 or 2, as launch_kernel(args,
// rows of x, columns of a group) computes it.
template <class T>
struct Problem {
  int m, n, k, kept, block, vector, bits, group_size;

  int units() const { return int(nm_units(k, kept, block)); }
  int panels() const { return int(div_up(n, kNmPanel)); }
  int groups() const { return int(div_up(k, group_size)); }

  NmPackArgs pack_args() const {
    NmPackArgs a{};
    a.n = n;
    a.k = k;
    a.kept = kept;
    a.block = block;
    a.vector = vector;
    a.bits = bits;
    a.groups = groups();
    return a;
  }

  // Up to `kept` columns of a block, the same for all rows of a vector.
  Bytes make_mask() const {
    Bytes mask(size_t(n) * k);
    for (int first = 0; first < n; first += vector) {
      for (int column = 0; column < k; column += block) {
        for (int i = 0; i < kept; ++i) {
          const int at = column + below(int(min_of(block, k - column)));
          for (int row = first; row < min_of(first + vector, n); ++row) mask[row * k + at] = 1;
        }
      }
    }
    return mask;
  }

  template <class Launch>
  void check(const char* name, const Launch& launch_kernel) const {
    Bytes mask = make_mask(), codes(mask.size());
    std::vector<T> floats(mask.size());
    std::vector<float> dense(mask.size());
    Bytes values(size_t(panels() * units() * nm_unit_value_bytes(bits)));
    Bytes index(
        size_t(div_up(n, nm_index_outputs(vector)) * units() * nm_unit_index_bytes(block, vector)));
    std::vector<float> scales(size_t(panels() * groups() * kNmPanel)), y(size_t(m) * n);
    std::vector<T> x(size_t(m) * k);
    NmPackArgs a = pack_args();
    a.mask = mask.data();
    a.weight = bits <= 8 ? static_cast<const void*>(codes.data()) : floats.data();
    for (float& scale : scales) scale = float(1 << below(3)) / 2.0f;
    for (T& element : x) element = eighths<T>();
    const int zero = 1 << (bits <= 8 ? bits - 1 : 0);
    for (int i = 0; i < n * k; ++i) {
      floats[i] = eighths<T>();
      codes[i] = uint8_t(below(2 * zero));
      const float scale = scales[size_t(nm_scale_at(a, i / k, i % k / group_size))];
      const float value = bits <= 8 ? float(codes[i] - zero) * scale : to_float(floats[i]);
      dense[i] = mask[i] != 0 ? value : 0.0f;
    }
    for (int row = 0; row < n; row += vector) {
      for (int unit = 0; unit < units(); ++unit) {
        nm_pack_unit(a, row, min_of(row + vector, n), unit, &values[0], &index[0]);
      }
    }
    NmGemmArgs args{m, n, k, kept, block, vector, bits};
    args.value_type =
        sizeof(T) == 2 && to_float(T{0x3c00}) == 1.0f ? FloatType::f16 : FloatType::bf16;
    args.group_size = group_size;
    args.groups = groups();
    args.values = values.data();
    args.index = index.data();
    args.scales = bits <= 8 ? scales.data() : nullptr;
    args.y = y.data();
    require(launch_kernel(args, NmRows{x.data(), k, m * k, k}, bits <= 8 ? group_size : k));
    int wrong = 0;
    for (int i = 0; i < m * n; ++i) {
      float sum = 0.0f;
      for (int l = 0; l < k; ++l) sum += to_float(x[i / n * k + l]) * dense[i % n * k + l];
      wrong += !(y[i] == sum);
    }
    report(name, wrong, wrong == 0);
  }
};

template <class Stream>
LaunchStatus launch_few(const NmGemmArgs& a, const NmRows& x, int span) {
  return launch("nm_few", nm_few<Stream, 1>, dim3(unsigned(div_up(a.n, kNmPanel))), kNmFewThreads,
                Stream::kSharedBytes, nullptr, a, x, int32_t(min_of(span, kNmTile)));
}
template <class Tiles>
LaunchStatus launch_many(const NmGemmArgs& a, const NmRows& x, int span) {
  using Shape = NmManyShape<Tiles, 1>;
  const int64_t blocks = div_up(a.n, kNmPanels * kNmPanel) * div_up(a.m, Shape::kTokens);
  return launch("nm_many", nm_many<Tiles, 1>, dim3(unsigned(blocks)), kNmManyThreads,
                Shape::kSharedBytes, nullptr, a, x, int32_t(span));
}

// More tiles than warps and stages, and a last one of 8 columns.
void check_nm_gemm() {
  Problem<f16>{9, 20, 584, 2, 4, 1, 4, 128}.check("2:4 int4, few rows of fp16",
                                                  launch_few<NmSparseStream<f16, 4>>);
  Problem<bf16>{3, 20, 584, 5, 8, 8, 16, 584}.check("8:5:8 bf16, few rows",
                                                    launch_few<NmDenseStream<bf16, 1>>);
  Problem<bf16>{70, 136, 264, 2, 4, 1, 16, 264}.check("2:4 bf16, many rows",
                                                      launch_many<NmSparseTiles<bf16, 16>>);
  Problem<bf16>{20, 33, 264, 2, 4, 16, 8, 32}.check("16:2:4 int8, many rows of bf16",
                                                    launch_many<NmSparseTiles<bf16, 8>>);
  Problem<f16>{20, 33, 264, 3, 16, 1, 4, 64}.check("3:16 int4, many rows of fp16",
                                                   launch_many<NmDenseTiles<f16, 1>>);
}

}  // namespace
}  // namespace ow::check

int main(int count, char** arguments) {
  return ow::check::run(count, arguments, ow::check::check_nm_gemm);
}
