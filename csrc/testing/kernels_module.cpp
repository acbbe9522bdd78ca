// _kernels: every kernel-table entry on numpy arrays, and the roofs of this machine. For tests and
// benchmarks; not in wheels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/layout.h"
#include "kernels/activations/activations.h"
#include "kernels/active_gemv/active_gemv.h"
#include "kernels/block_scores/block_scores.h"
#include "kernels/block_sparse_gemm/block_sparse_gemm.h"
#include "kernels/decode_attention/decode_attention.h"
#include "kernels/kv_cache/kv_cache.h"
#include "kernels/line_scores/line_scores.h"
#include "kernels/lowbit_gemm/lowbit_gemm.h"
#include "kernels/paged_attention/paged_attention.h"
#include "kernels/quantize/quantize.h"
#include "kernels/sparse_gemm/sparse_gemm.h"
#include "testing/arrays_module.h"
#include "testing/block_attention_module.h"
#include "testing/cache_kernels.h"
#include "testing/nm_gemm_module.h"
#include "testing/peaks.h"
#include "testing/scores_kernels.h"
#include "testing/sparse_kernels.h"

namespace ow {
namespace {

Isa parse_isa(const std::string& name) {
  Isa isa;
  if (!isa_from_name(name.c_str(), &isa)) throw std::invalid_argument("unknown tier " + name);
  if (isa > detected_isa()) throw std::invalid_argument("this CPU has no tier " + name);
  return isa;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double peak_ops(const std::string& unit, const std::string& tier, double seconds) {
  const struct {
    Isa isa;
    const char* unit;
    PeakFn fn;
  } peaks[] = {
#define OW_ROW(isa, unit, fn) {Isa::isa, #unit, fn},
      OW_PEAKS(OW_ROW)
#undef OW_ROW
  };
  const Isa isa = parse_isa(tier);
  for (const auto& peak : peaks) {
    if (peak.isa > isa || unit != peak.unit) continue;
    const py::gil_scoped_release release;
    float sink = 0.0f;
    double operations = 0.0;
    const double begin = now();
    double elapsed = 0.0;
    while (elapsed < seconds) {
      operations += peak.fn(100000, &sink);
      elapsed = now() - begin;
    }
    return operations / elapsed;
  }
  throw std::invalid_argument("tier " + tier + " has no unit " + unit);
}

double stream_read(const Array<uint8_t>& data, int64_t repetitions, const std::string& tier) {
  const struct {
    Isa isa;
    StreamReadFn fn;
  } reads[] = {
#define OW_ROW(isa, fn) {Isa::isa, fn},
      OW_STREAM_READS(OW_ROW)
#undef OW_ROW
  };
  const Isa isa = parse_isa(tier);
  for (const auto& read : reads) {
    if (read.isa > isa) continue;
    const uint8_t* bytes = data.data();
    const int64_t size = data.size();
    const py::gil_scoped_release release;
    volatile uint64_t digest = 0;
    const double begin = now();
    for (int64_t i = 0; i < repetitions; ++i) digest = digest ^ read.fn(bytes, size);
    return now() - begin;
  }
  throw std::logic_error("stream_read: no scalar kernel");
}

// (name, tier, key, max_m) of a family's table entries, in table order.
std::vector<std::tuple<std::string, std::string, int32_t, int64_t>> kernel_table(
    const std::string& family) {
#define OW_ROW(isa, key, max_m, fn) {#fn, #isa, key, max_m},
  if (family == "lowbit_gemm") return {OW_LOWBIT_GEMM_KERNELS(OW_ROW)};
  if (family == "nm_gemm") return {OW_NM_GEMM_KERNELS(OW_ROW)};
  if (family == "quantize") return {OW_QUANTIZE_KERNELS(OW_ROW)};
  if (family == "activations") return {OW_ACTIVATIONS_KERNELS(OW_ROW)};
  if (family == "decode_attention") return {OW_DECODE_ATTENTION_KERNELS(OW_ROW)};
  if (family == "block_attention") return {OW_BLOCK_ATTENTION_KERNELS(OW_ROW)};
  if (family == "block_scores") return {OW_BLOCK_SCORES_KERNELS(OW_ROW)};
  if (family == "kv_cache") return {OW_KV_CACHE_KERNELS(OW_ROW)};
  if (family == "line_scores") return {OW_LINE_SCORES_KERNELS(OW_ROW)};
  if (family == "paged_attention") return {OW_PAGED_ATTENTION_KERNELS(OW_ROW)};
  if (family == "sparse_gemm") return {OW_SPARSE_GEMM_KERNELS(OW_ROW)};
  if (family == "sampled_gemm") return {OW_SAMPLED_GEMM_KERNELS(OW_ROW)};
  if (family == "block_sparse_gemm") return {OW_BLOCK_SPARSE_GEMM_KERNELS(OW_ROW)};
  if (family == "active_gemv") return {OW_ACTIVE_GEMV_KERNELS(OW_ROW)};
#undef OW_ROW
  throw std::invalid_argument("unknown family " + family);
}

std::tuple<Array<int8_t>, Array<float>, Array<int32_t>> encode(
    const std::string& kernel, const py::array& x, int64_t group_size, int digits, int64_t k_padded,
    int64_t row_block, int64_t k_block, int32_t sum_factor) {
  check_contiguous(x, "x");
  const int64_t m = x.shape(0);
  const int64_t k = x.shape(1);
  const int64_t groups = div_up(k, group_size);
  // Poisoned: a kernel must write every element it owns.
  const RowBlocks blocks{row_block, k_block, k_padded};
  Array<int8_t> codes({element_count(blocks, m * digits)});
  std::memset(codes.mutable_data(), 0x55, size_t(codes.nbytes()));
  Array<float> scales(digits == 1 ? std::vector<int64_t>{m} : std::vector<int64_t>{m, groups});
  std::fill_n(scales.mutable_data(), scales.size(), -1.0f);
  Array<int32_t> sums({m, int64_t(digits), groups});
  std::fill_n(sums.mutable_data(), sums.size(), INT32_MIN);
  const EncodeArgs args{m,
                        k,
                        group_size,
                        digits,
                        blocks,
                        float_type(x, "x"),
                        x.data(),
                        k,
                        sum_factor,
                        codes.mutable_data(),
                        scales.mutable_data(),
                        sums.mutable_data()};
#define OW_ROW(isa, key, max_m, fn) \
  if (kernel == #fn) return fn(args, 0, m), std::tuple(codes, scales, sums);
  OW_QUANTIZE_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

// Digit rows as a kernel reads them: in blocks, padded with zeros along k. Rows past the last are
// poisoned.
std::vector<int8_t> block_digits(const int8_t* x, int64_t rows, int64_t k, const RowBlocks& b) {
  std::vector<int8_t> blocks(size_t(element_count(b, rows)), 0x55);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < b.k_padded; ++j) {
      blocks[size_t(element_at(b, r, j))] = j < k ? x[r * k + j] : int8_t{0};
    }
  }
  return blocks;
}

KernelEntry<LowbitGemmFn> lowbit_gemm_entry(const std::string& kernel) {
#define OW_ROW(isa, key, max_m, fn) \
  if (kernel == #fn) return {#fn, Isa::isa, key, max_m, fn};
  OW_LOWBIT_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

std::vector<int32_t> group_sums(const int8_t* x, int64_t rows, int64_t k, int64_t group_size,
                                int32_t factor) {
  std::vector<int32_t> sums;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t begin = 0; begin < k; begin += group_size) {
      int32_t sum = 0;
      for (int64_t j = begin; j < min_of(begin + group_size, k); ++j) sum += x[r * k + j];
      sums.push_back(factor * sum);
    }
  }
  return sums;
}

// A weight as its kernels read it; scales of the outputs past n are poisoned.
struct Packed {
  std::vector<uint8_t> w, scales, zeros;

  Packed(const Array<uint8_t>& codes, const py::array& code_scales,
         const std::optional<Array<uint8_t>>& code_zeros, int bits) {
    const int64_t n = codes.shape(0);
    const int64_t k = codes.shape(1);
    const int64_t groups = code_scales.shape(1);
    const int64_t panels = div_up(n, kPanel);
    const int64_t scale_size = code_scales.itemsize();
    w.resize(size_t(panels * panel_bytes(bits, round_up(k, kPadK))));
    scales.resize(size_t(panels * groups * kPanel * scale_size));
    zeros.resize(size_t(panels * groups * kPanel));
    pack_lowbit({n, k, round_up(k, kPadK), groups, bits, scale_size}, codes.data(),
                code_scales.data(), code_zeros ? code_zeros->data() : nullptr, w.data(),
                scales.data(), zeros.data(), serial_parallel());
    for (int64_t row = n; row < panels * kPanel; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = (row / kPanel * groups + g) * kPanel + row % kPanel;
        // A NaN in each of the three types.
        std::memset(scales.data() + at * scale_size, 0x7f, size_t(scale_size));
      }
    }
  }
};

// One lowbit_gemm kernel on encoded x: int8 [m, digits, k], or the bits of bf16 [m, k].
void lowbit_gemm_kernel(const std::string& kernel, const py::array& x,
                        const std::optional<Array<float>>& x_scales, const Array<uint8_t>& codes,
                        const py::array& scales, const std::optional<Array<uint8_t>>& zeros,
                        int bits, int64_t group_size, const std::optional<py::array>& bias,
                        const std::optional<py::array>& add, py::array y) {
  check_contiguous(x, "x");
  check_contiguous(scales, "scales");
  check_contiguous(y, "y");
  const Packed packed(codes, scales, zeros, bits);
  LowbitGemmArgs args{};
  args.m = x.shape(0);
  args.n = codes.shape(0);
  args.k = codes.shape(1);
  args.k_padded = round_up(args.k, kPadK);
  args.group_size = group_size;
  args.groups = div_up(args.k, group_size);
  args.bits = bits;
  args.digits = x.ndim() == 3 ? int32_t(x.shape(1)) : 0;
  args.w = packed.w.data();
  args.w_scales = packed.scales.data();
  args.w_scales_type = float_type(scales, "scales");
  args.w_zeros = zeros ? packed.zeros.data() : nullptr;
  args.bias = bias ? bias->data() : nullptr;
  args.add = add ? add->data() : nullptr;
  args.y = y.mutable_data();
  args.y_type = float_type(y, "y");

  std::vector<bf16> rows;
  std::vector<int8_t> digits;
  std::vector<int32_t> sums;
  const KernelEntry<LowbitGemmFn> entry = lowbit_gemm_entry(kernel);
  args.x_blocks = lowbit_gemm_x_blocks(entry, args.m, args.digits, args.k);
  if (args.digits == 0) {
    rows.resize(size_t(element_count(args.x_blocks, args.m)));
    block_bf16_rows(static_cast<const bf16*>(x.data()), args.m, args.k, args.x_blocks, rows.data(),
                    serial_parallel());
    args.x = rows.data();
  } else {
    const int8_t* from = static_cast<const int8_t*>(x.data());
    const int64_t digit_rows = args.m * args.digits;
    digits = block_digits(from, digit_rows, args.k, args.x_blocks);
    sums = group_sums(from, digit_rows, args.k, group_size, lowbit_sum_factor(bits, !zeros));
    args.x = digits.data();
    args.x_scales = x_scales.value().data();
    args.x_sums = sums.data();
  }
  entry.fn(args, 0, div_up(args.n, kPanel));
}

const ActivationKernels& activation_kernels(const std::string& kernel) {
#define OW_ROW(isa, key, max_m, kernels) \
  if (kernel == #kernels) return kernels;
  OW_ACTIVATIONS_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

void rms_norm_kernel(const std::string& kernel, const py::array& x, const py::array& w, float eps,
                     py::array y) {
  check_contiguous(x, "x");
  const RmsNormArgs args{x.shape(0), x.shape(1), float_type(x, "x"), x.data(),
                         w.data(),   eps,        y.mutable_data()};
  activation_kernels(kernel).rms_norm(args, 0, args.m);
}

void silu_mul_kernel(const std::string& kernel, const py::array& x, py::array y) {
  check_contiguous(x, "x");
  const SiluMulArgs args{y.shape(0), y.shape(1), float_type(x, "x"), x.data(), y.mutable_data()};
  activation_kernels(kernel).silu_mul(args, 0, args.m);
}

// HeadStrides or CacheStrides: of the first three of four dimensions, in elements.
template <class Strides>
Strides outer_strides(const py::array& array) {
  const int64_t size = array.itemsize();
  return {array.strides(0) / size, array.strides(1) / size, array.strides(2) / size};
}

void rope_kernel(const std::string& kernel, const py::array& x, const Array<float>& cos,
                 const Array<float>& sin, int64_t turned, py::array y) {
  RopeArgs args{};
  args.b = x.shape(0);
  args.t = x.shape(1);
  args.h = x.shape(2);
  args.d = x.shape(3);
  args.turned = turned;
  args.type = float_type(x, "x");
  args.x = x.data();
  args.x_strides = outer_strides<HeadStrides>(x);
  args.cos = cos.data();
  args.sin = sin.data();
  args.y = y.mutable_data();
  args.y_strides = outer_strides<HeadStrides>(y);
  activation_kernels(kernel).rope(args, 0, args.b * args.t);
}

void decode_attention_kernel(const std::string& kernel, const py::array& q, const py::array& keys,
                             const py::array& values, float scale, py::array y,
                             std::optional<py::array> lse) {
  check_contiguous(q, "q");
  DecodeAttentionArgs args{};
  args.b = q.shape(0);
  args.queries = q.shape(1);
  args.heads = q.shape(2);
  args.kv_heads = keys.shape(1);
  args.d = q.shape(3);
  args.dv = values.shape(3);
  args.n = keys.shape(2);
  args.type = float_type(q, "q");
  args.scale = scale;
  args.q = q.data();
  args.keys = keys.data();
  args.key_strides = outer_strides<CacheStrides>(keys);
  args.values = values.data();
  args.value_strides = outer_strides<CacheStrides>(values);
  // Poisoned: `attend` must write every state that `merge` reads.
  std::vector<float> states(size_t(decode_attention_state_count(args)), bits_to_float(0x7fc00000));
  args.states = states.data();
  args.y = y.mutable_data();
  args.lse = lse ? static_cast<float*>(lse->mutable_data()) : nullptr;
  const auto run = [&](const DecodeAttentionKernels& kernels) {
    kernels.attend(args, 0, items_of(args) * spans_of(args));
    kernels.merge(args, 0, items_of(args));
  };
#define OW_ROW(isa, key, max_m, kernels) \
  if (kernel == #kernels) return run(kernels);
  OW_DECODE_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

}  // namespace
}  // namespace ow

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "Kernels on numpy arrays, and measured machine peaks. For tests and benchmarks.";
  m.def("peak_ops", &ow::peak_ops, py::arg("unit"), py::arg("tier"), py::arg("seconds"),
        "Operations per second of one thread; unit is fp32, bf16 or int8.");
  m.def("stream_read", &ow::stream_read, py::arg("data"), py::arg("repetitions"), py::arg("tier"),
        "Seconds one thread takes to read data `repetitions` times.");
  m.def("kernel_table", &ow::kernel_table, py::arg("family"),
        "(name, tier, key, max_m) of every kernel of a family, best first.");
  m.def("encode_rows", &ow::encode, py::arg("kernel"), py::arg("x"), py::arg("group_size"),
        py::arg("digits"), py::arg("k_padded"), py::arg("row_block"), py::arg("k_block"),
        py::arg("sum_factor"), "(codes, scales, sums) of the named kernel; codes flat, in blocks.");
  m.def("lowbit_gemm", &ow::lowbit_gemm_kernel, py::arg("kernel"), py::arg("x"),
        py::arg("x_scales"), py::arg("codes"), py::arg("scales"), py::arg("zeros"), py::arg("bits"),
        py::arg("group_size"), py::arg("bias"), py::arg("add"), py::arg("y"),
        "Writes y [m, n]; x is int8 [m, digits, k], or the bits of bf16 [m, k].");
  ow::bind_nm_gemm(m);
  ow::bind_block_attention(m);
  m.def("rms_norm", &ow::rms_norm_kernel, py::arg("kernel"), py::arg("x"), py::arg("w"),
        py::arg("eps"), py::arg("y"), "Writes y [m, d].");
  m.def("silu_mul", &ow::silu_mul_kernel, py::arg("kernel"), py::arg("x"), py::arg("y"),
        "Writes y [m, d] from x [m, 2d].");
  m.def("rope", &ow::rope_kernel, py::arg("kernel"), py::arg("x"), py::arg("cos"), py::arg("sin"),
        py::arg("turned"), py::arg("y"),
        "Writes y [b, t, h, d]; x and y may be strided, their last dimension contiguous.");
  m.def("decode_attention", &ow::decode_attention_kernel, py::arg("kernel"), py::arg("q"),
        py::arg("keys"), py::arg("values"), py::arg("scale"), py::arg("y"), py::arg("lse"),
        "Writes y [b, queries, heads, dv] and lse [b, queries, heads], which may be None; keys and "
        "values [b, kv_heads, n, d and dv] may be strided, their last dimension contiguous.");
  ow::bind_cache_kernels(m);
  ow::bind_scores_kernels(m);
  ow::bind_sparse_kernels(m);
}
