// nm_gemm.cu and nm_gemm_pack.cu, on data that is exact in any order of sums. Of the kernels only
// those that the calls below need are made: all take too long to compile under sanitizers.
#include "cuda/device.h"

#include "check_family.h"
#include "cuda/launch.h"
#include "kernels/nm_gemm/nm_gemm_choice_cuda.h"
#include "kernels/nm_gemm/nm_gemm_cuda.h"
#include "kernels/nm_gemm/nm_gemm_few_cuda.h"
#include "kernels/nm_gemm/nm_gemm_many_cuda.h"
#include "kernels/nm_gemm/nm_gemm_pack_body.h"

namespace ow {
namespace {

template <class Stream>
LaunchStatus few(const NmGemmArgs& a, const NmRows& x, int span, void* stream) {
  return launch("nm_few", nm_few<Stream, 1>, dim3(unsigned(div_up(a.n, kNmPanel))), kNmFewThreads,
                Stream::kSharedBytes, stream, a, x, int32_t(min_of(span, kNmTile)));
}
template <class Tiles, int kXPieces>
LaunchStatus many(const NmGemmArgs& a, const NmRows& x, int span, void* stream) {
  using Shape = NmManyShape<Tiles, kXPieces>;
  const int64_t blocks = div_up(a.n, kNmOutputs) * div_up(a.m, Shape::kTokens);
  return launch("nm_many", nm_many<Tiles, kXPieces>, dim3(unsigned(blocks)), kNmManyThreads,
                Shape::kSharedBytes, stream, a, x, int32_t(span));
}
bool is_sparse(const NmGemmArgs& a) { return a.kept == 2 && a.block == 4; }

}  // namespace

LaunchStatus launch_nm_few(const NmGemmArgs& a, const NmRows& x, int32_t span, void* stream) {
  return is_sparse(a) ? few<NmSparseStream<f16, 4>>(a, x, span, stream)
                      : few<NmDenseStream<bf16, 1>>(a, x, span, stream);
}
LaunchStatus launch_nm_many(const NmGemmArgs& a, const NmRows& x, int32_t span, void* stream) {
  if (!is_sparse(a)) return many<NmDenseTiles<bf16, 1>, 3>(a, x, span, stream);
  return a.bits == 16 ? many<NmSparseTiles<bf16, 16>, 1>(a, x, span, stream)
                      : many<NmSparseTiles<bf16, 8>, 1>(a, x, span, stream);
}

namespace check {
namespace {

int below(int n) { return int(random_bits() % uint32_t(n)); }
// Eighths up to one, of which products and sums of hundreds are exact in fp32.
Bytes eighths(int count, FloatType type) {
  Bytes floats(size_t(count * float_size(type)));
  for (int i = 0; i < count; ++i) {
    write_float(floats.data(), type, i, float(below(17) - 8) / 8.0f);
  }
  return floats;
}

// A product of x of a type with a weight of bf16 or of codes, whose scales are 1/2, 1 or 2.
struct Problem {
  FloatType type;
  int m, n, k, kept, block, vector, bits, group_size;

  int groups() const { return int(div_up(k, group_size)); }
  int size() const { return n * k; }

  // Up to `kept` columns of a block, the same for all rows of a vector.
  Bytes make_mask() const {
    Bytes mask = Bytes(size_t(size()));
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

  void check() const {
    const Bytes mask = make_mask();
    const bool codes = bits <= 8;
    Bytes weight = eighths(size(), FloatType::bf16);
    if (codes) {
      for (int i = 0; i < size(); ++i) weight[i] = uint8_t(below(1 << bits));
    }
    std::vector<float> scales(size_t(n * groups()));
    for (float& scale : scales) scale = float(1 << below(3)) / 2.0f;
    NmPackArgs pack{n, k, kept, block, vector, bits, groups(), 4, weight.data(), mask.data()};
    pack.scales = codes ? scales.data() : nullptr;
    NmFaults faults{}, scratch{};
    require(launch_find_nm_faults(pack, FloatType::f32, &scratch, &faults, nullptr));
    report("no faults", k, faults.excess == kNmFaultless && faults.code == kNmFaultless);

    const int64_t units = nm_units(k, kept, block);
    const int64_t panels = div_up(n, kNmPanel);
    Bytes values(size_t(panels * units * nm_unit_value_bytes(bits)));
    Bytes index(
        size_t(div_up(n, nm_index_outputs(vector)) * units * nm_unit_index_bytes(block, vector)));
    std::vector<float> packed_scales(size_t(panels * groups() * kNmPanel));
    require(launch_compress_nm(pack, values.data(), index.data(), packed_scales.data(), nullptr));
    Bytes expanded(size_t(size() * (codes ? 1 : 2)));
    std::vector<float> expanded_scales(scales.size());
    require(launch_expand_nm(pack, values.data(), index.data(),
                             codes ? packed_scales.data() : nullptr, expanded.data(),
                             expanded_scales.data(), nullptr));
    report("scales", k, !codes || scales == expanded_scales);

    const Bytes x = eighths(m * k, type);
    Bytes y(size_t(m * n * float_size(FloatType::f32)));
    NmGemmArgs a{m, n, k, kept, block, vector, bits, FloatType::bf16};
    a.group_size = group_size;
    a.groups = groups();
    a.x = x.data();
    a.values = values.data();
    a.index = index.data();
    a.scales = codes ? packed_scales.data() : nullptr;
    a.y_type = type;
    a.y = y.data();
    Bytes laid(size_t(nm_cuda_laid_bytes(a)));
    a.laid = laid.data();
    require(launch_nm_gemm(a, nullptr));
    compare(a, expanded, scales, mask, weight);
  }

  void compare(const NmGemmArgs& a, const Bytes& expanded, const std::vector<float>& scales,
               const Bytes& mask, const Bytes& weight) const {
    const int zero = 1 << (bits <= 8 ? bits - 1 : 0);
    std::vector<float> dense(mask.size());
    bool same = true;
    for (int i = 0; i < size(); ++i) {
      const auto value = [&](const Bytes& of) {
        return bits <= 8 ? float(of[i] - zero) * scales[i / k * groups() + i % k / group_size]
                         : read_float(of.data(), FloatType::bf16, i);
      };
      dense[i] = mask[i] != 0 ? value(weight) : 0.0f;
      same = same && value(expanded) == dense[i];
    }
    report("expand_nm of compress_nm", k, same);
    int wrong = 0;
    for (int i = 0; i < m * n; ++i) {
      float sum = 0.0f;
      for (int l = 0; l < k; ++l)
        sum += read_float(a.x, type, i / n * k + l) * dense[i % n * k + l];
      Bytes rounded(4);
      write_float(rounded.data(), type, 0, sum);
      wrong += !(read_float(a.y, type, i) == read_float(rounded.data(), type, 0));
    }
    report("nm_gemm", k, wrong == 0);
  }
};

// More tiles than warps and stages, of the result more than a group of 16, ragged ends, x as it is
// (k % 8 = 0) and laid out.
void check_nm_gemm() {
  Problem{FloatType::f16, 9, 20, 3624, 2, 4, 1, 4, 128}.check();
  Problem{FloatType::bf16, 3, 20, 583, 5, 8, 8, 16, 583}.check();
  Problem{FloatType::bf16, 70, 136, 264, 2, 4, 1, 16, 264}.check();
  Problem{FloatType::bf16, 20, 33, 261, 2, 4, 16, 8, 32}.check();
  Problem{FloatType::bf16, 70, 2100, 32, 2, 4, 1, 8, 32}.check();
  Problem{FloatType::f32, 20, 33, 264, 3, 16, 1, 4, 64}.check();
}

}  // namespace
}  // namespace check
}  // namespace ow

int main(int count, char** arguments) {
  return ow::check::run(count, arguments, ow::check::check_nm_gemm);
}
