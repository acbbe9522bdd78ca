// Column-skipping products and their driver.
#include <math.h>

#include "kernels/active_gemv/active_gemv.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<ActiveGemvFn> kActive[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_ACTIVE_GEMV_KERNELS(OW_ROW)
#undef OW_ROW
};

struct Problem {
  ActiveGemvArgs args{};
  int64_t k, group_size;
  std::vector<double> dense;  // [n, k]
  Bytes columns, zeros, x, bias, add;
  std::vector<float> scales;
  std::vector<int32_t> index;
  std::vector<float> active_x;
  std::vector<int64_t> group_end;

  // bits 0: floats; `variant` picks their type, that of y, and whether there are zero points.
  Problem(int64_t n, int64_t k_, int32_t bits, int64_t group_size_, float threshold, int variant)
      : k(k_), group_size(bits == 0 ? k_ : group_size_) {
    args.n = n;
    args.n_padded = round_up(n, strip_outputs(bits));
    args.groups = div_up(k, group_size);
    args.bits = bits;
    args.type = bits != 0          ? ColumnType::codes
                : variant % 2 == 0 ? ColumnType::f32
                                   : ColumnType::bf16;
    args.y_type = kTypes[variant % 3];
    dense.resize(size_t(n * k));
    if (bits == 0) {
      fill_floats();
    } else {
      fill_codes(variant % 2 == 0);
    }
    x = floats(k, args.y_type, 1.0f);
    bias = floats(n, args.y_type, 1.0f);
    add = floats(n, args.y_type, 1.0f);
    index.resize(size_t(k));
    active_x.resize(size_t(k));
    group_end.resize(size_t(args.groups));
    const int64_t count = find_active(x.data(), args.y_type, k, group_size, threshold, index.data(),
                                      active_x.data(), group_end.data());
    index.resize(size_t(count));
    active_x.resize(size_t(count));
  }

  void fill_floats() {
    const FloatType type = args.type == ColumnType::f32 ? FloatType::f32 : FloatType::bf16;
    columns = floats(k * args.n_padded, type, 1.0f);
    for (int64_t i = 0; i < args.n * k; ++i) {
      dense[size_t(i)] = read(columns.data(), type, i % k * args.n_padded + i / k);
    }
  }

  void fill_codes(bool symmetric) {
    const int64_t top = int64_t{1} << args.bits;
    Bytes codes;
    for (int64_t i = 0; i < args.n * k; ++i) codes.push_back(uint8_t(rng.below(top)));
    columns.resize(size_t(k * strips_bytes(args.bits, args.n_padded)));
    pack_code_columns({args.n, k, args.n_padded, args.bits}, codes.data(), columns.data(),
                      serial_parallel());
    for (int64_t i = 0; i < args.groups * args.n_padded; ++i) {
      scales.push_back(rng.uniform());
      zeros.push_back(uint8_t(symmetric ? top / 2 : rng.below(top)));
    }
    for (int64_t i = 0; i < args.n * k; ++i) {
      const size_t at = size_t(i % k / group_size * args.n_padded + i / k);
      dense[size_t(i)] = double(scales[at]) * (int(codes[size_t(i)]) - int(zeros[at]));
    }
    if (symmetric) zeros.clear();
  }

  ActiveColumns active() const {
    return {int64_t(index.size()), index.data(), active_x.data(), group_end.data()};
  }

  bool right(const void* y) const {
    for (int64_t n = 0; n < args.n; ++n) {
      double sum = read(bias.data(), args.y_type, n) + read(add.data(), args.y_type, n);
      double size = fabs(sum) + 2.0;
      for (size_t i = 0; i < index.size(); ++i) {
        sum += dense[size_t(n * k + index[i])] * active_x[i];
        size += fabs(double(active_x[i])) * (args.bits == 0 ? 1.0 : double(2 << args.bits));
      }
      const double error = double(2 * k + 4) * 0x1p-24 * size;
      const double bound = error + double(roundoff(args.y_type)) * (fabs(sum) + error) + 0x1p-25;
      if (!(fabs(double(read(y, args.y_type, n)) - sum) <= bound)) return false;
    }
    return true;
  }
};

void check_kernel(const KernelEntry<ActiveGemvFn>& entry, const Problem& p, Guarded* memory) {
  running = entry.name;
  for (const Against side : kSides) {
    memory->restart(side);
    ActiveGemvArgs a = p.args;
    a.columns = memory->copy(p.columns);
    if (a.bits != 0) a.scales = memory->copy(p.scales);
    if (!p.zeros.empty()) a.zeros = memory->copy(p.zeros);
    a.active = {int64_t(p.index.size()), memory->copy(p.index), memory->copy(p.active_x),
                memory->copy(p.group_end)};
    a.bias = memory->copy(p.bias);
    a.add = memory->copy(p.add);
    a.y = memory->empty<uint8_t>(p.add.size());
    const int64_t strip = strip_outputs(a.bits);
    const int64_t middle = a.n_padded / strip / 2 * strip;
    entry.fn(a, middle, a.n_padded);
    entry.fn(a, 0, middle);
    CHECK(p.right(a.y), "%s: n %d, k %d, %d bits, group %d, type %d differs", entry.name, int(a.n),
          int(p.k), a.bits, int(p.group_size), int(a.y_type));
    CHECK(memory->intact(), "%s: wrote outside of y", entry.name);
  }
}

void check_driver() {
  for (const int32_t bits : {0, 4}) {
    const Problem p(1500, 300, bits, 64, 0.3f, 0);
    for (int tier = 0; tier <= int(detected_isa()); ++tier) {
      const auto run = [&](const Parallel& parallel) {
        ActiveGemvArgs a = p.args;
        Bytes y(p.add.size(), Guarded::kPoison);
        a.columns = p.columns.data();
        a.scales = p.scales.data();
        a.active = p.active();
        a.y = y.data();
        active_gemv(a, Isa(tier), parallel);
        return y;
      };
      const Bytes whole = run(serial_parallel());
      for (const int64_t threads : {2, 3, 7}) {
        CHECK(run(reversed_parallel(threads)) == whole, "active_gemv: %s: depends on %d threads",
              isa_name(Isa(tier)), int(threads));
      }
    }
  }
}

}  // namespace

void check_active_gemv(Guarded* memory) {
  constexpr int64_t kSizes[][2] = {{1, 1}, {16, 5}, {17, 33}, {129, 64}, {255, 37}, {600, 50}};
  int variant = 0;
  for (const auto& size : kSizes) {
    for (const int32_t bits : {0, 2, 3, 4, 8}) {
      for (const float threshold : {0.0f, 0.5f, 2.0f}) {
        for (int i = 0; i < 6; ++i) {
          const Problem p(size[0], size[1], bits, i < 3 ? 16 : size[1], threshold, variant++);
          for (const auto& entry : kActive) {
            if (entry.isa <= detected_isa()) check_kernel(entry, p, memory);
          }
        }
      }
    }
  }
  check_driver();
}

}  // namespace ow::testing
