// _kernels: every kernel-table entry on numpy arrays, and the roofs of this machine. For tests and
// benchmarks; not in wheels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/layout.h"
#include "kernels/lowbit_gemm/lowbit_gemm.h"
#include "kernels/quantize/quantize.h"
#include "testing/peaks.h"

namespace py = pybind11;

namespace ow {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

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

std::tuple<Array<int8_t>, Array<float>, Array<int32_t>> encode(const std::string& kernel,
                                                                const Array<float>& x,
                                                                int64_t group_size, int digits,
                                                                int64_t k_padded,
                                                                int64_t row_block, int32_t sum_factor) {
  const int64_t m = x.shape(0);
  const int64_t k = x.shape(1);
  const int64_t groups = div_up(k, group_size);
  // Poisoned: a kernel must write every element it owns.
  const int64_t blocks = div_up(m * digits, row_block);
  Array<int8_t> codes({blocks, k_padded / 16, row_block, int64_t{16}});
  std::memset(codes.mutable_data(), 0x55, size_t(codes.nbytes()));
  Array<float> scales(digits == 1 ? std::vector<int64_t>{m} : std::vector<int64_t>{m, groups});
  Array<int32_t> sums({m, int64_t(digits), groups});
  const EncodeArgs args{m,
                        k,
                        k_padded,
                        group_size,
                        digits,
                        row_block,
                        FloatType::f32,
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

// One lowbit_gemm kernel on codes: packs, encodes with the scalar kernel, runs the named kernel.
Array<float> lowbit_gemm_kernel(const std::string& kernel, const Array<float>& x,
                                const Array<uint8_t>& codes, const Array<float>& scales,
                                const std::optional<Array<uint8_t>>& zeros, int bits,
                                int64_t group_size, int digits) {
  const int64_t m = x.shape(0);
  const int64_t k = x.shape(1);
  const int64_t n = codes.shape(0);
  const int64_t k_padded = round_up(k, kPadK);
  const int64_t groups = div_up(k, group_size);
  const int64_t panels = div_up(n, kPanel);
  std::vector<uint8_t> packed(size_t(panels * panel_bytes(bits, k_padded)));
  std::vector<float> packed_scales(size_t(panels * groups * kPanel));
  std::vector<uint8_t> packed_zeros(packed_scales.size());
  pack_lowbit({n, k, k_padded, groups, bits, 4}, codes.data(), scales.data(),
              zeros ? zeros->data() : nullptr, packed.data(), packed_scales.data(),
              packed_zeros.data(), serial_parallel());

  Array<float> y({m, n});
  std::fill_n(y.mutable_data(), y.size(), std::numeric_limits<float>::quiet_NaN());
  LowbitGemmArgs args{};
  args.m = m;
  args.n = n;
  args.k = k;
  args.k_padded = k_padded;
  args.group_size = group_size;
  args.groups = groups;
  args.bits = bits;
  args.digits = digits;
  args.w = packed.data();
  args.w_scales = packed_scales.data();
  args.w_scales_type = FloatType::f32;
  args.w_zeros = zeros ? packed_zeros.data() : nullptr;
  args.y = y.mutable_data();
  args.y_type = FloatType::f32;

  std::vector<bf16> rows(size_t(m * k_padded), bf16{0});
  std::tuple<Array<int8_t>, Array<float>, Array<int32_t>> encoded;
  if (digits == 0) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < k; ++j) from_float(x.at(i, j), &rows[size_t(i * k_padded + j)]);
    }
    args.x = rows.data();
  } else {
    args.row_block = kernel.find("_tile_") != std::string::npos ? kTileRowBlock : m * digits;
    encoded = encode("encode_rows_scalar", x, group_size, digits, k_padded, args.row_block,
                     lowbit_sum_factor(bits, !zeros));
    args.x = std::get<0>(encoded).data();
    args.x_scales = std::get<1>(encoded).data();
    args.x_sums = std::get<2>(encoded).data();
  }
#define OW_ROW(isa, key, max_m, fn) \
  if (kernel == #fn) return fn(args, 0, panels), y;
  OW_LOWBIT_GEMM_KERNELS(OW_ROW)
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
  m.def("encode_rows", &ow::encode, py::arg("kernel"), py::arg("x"), py::arg("group_size"),
        py::arg("digits"), py::arg("k_padded"), py::arg("row_block"), py::arg("sum_factor"),
        "(codes, scales, sums) of the named kernel; codes [blocks, k_padded / 16, row_block, 16].");
  m.def("lowbit_gemm", &ow::lowbit_gemm_kernel, py::arg("kernel"), py::arg("x"), py::arg("codes"),
        py::arg("scales"), py::arg("zeros"), py::arg("bits"), py::arg("group_size"),
        py::arg("digits"), "y [m, n] of the named kernel; digits 0 takes x as bf16.");
}
