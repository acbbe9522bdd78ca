#include "check_family.h"

#include "kernels/lowbit_gemm/lowbit_gemm_cuda.h"

namespace {

using namespace ow;

// digits: 0 for x of `type`; 1 or 3 for int8.
struct Call {
  int64_t m, n, k, group_size;
  int32_t bits, digits;
  FloatType type;
  bool zeros;
  int multiprocessors;  // the more, the more cuts
};

// Few rows, up to 16, and more; groups of half a block to all of k; tiles whole, cut within, and
// cut where a block has more than one.
constexpr Call kCalls[] = {
    {3, 70, 300, 16, 4, 0, FloatType::f16, true, 2},
    {8, 33, 260, 32, 8, 0, FloatType::bf16, true, 1},
    {5, 64, 800, 800, 8, 1, FloatType::f32, true, 3},
    {1, 40, 320, 64, 3, 3, FloatType::f32, false, 2},
    {2, 96, 512, 128, 2, 0, FloatType::f16, false, 5},
    {11, 70, 200, 16, 3, 0, FloatType::bf16, true, 9},
    {16, 130, 512, 64, 8, 1, FloatType::bf16, true, 1},
    {12, 40, 100, 32, 4, 3, FloatType::f32, true, 1},
    {130, 40, 300, 64, 4, 0, FloatType::f16, true, 1},
    {33, 33, 600, 600, 4, 1, FloatType::f16, false, 1},
    {20, 33, 100, 16, 2, 1, FloatType::f32, true, 1},
};

int below(int n) { return int(check::random_bits() % uint32_t(n)); }

// Every sum is exact in fp32, so that results are equal in any order: x are eighths, or digits that
// leave room for all, and scales are 1/4 or 1/2.
void check_call(const Call& c) {
  const int64_t k_padded = round_up(c.k, kPadK);
  const int64_t groups = div_up(c.k, c.group_size);
  const int64_t panels = div_up(c.n, kPanel);
  check::Bytes codes(size_t(c.n * c.k)), zeros(size_t(c.n * groups));
  check::Bytes packed(size_t(panels * panel_bytes(c.bits, k_padded)));
  check::Bytes packed_zeros(size_t(panels * groups * kPanel));
  std::vector<float> scales(size_t(c.n * groups)), packed_scales(packed_zeros.size());
  for (uint8_t& code : codes) code = uint8_t(below(1 << c.bits));
  for (uint8_t& zero : zeros) zero = uint8_t(c.zeros ? below(1 << c.bits) : 1 << (c.bits - 1));
  for (float& scale : scales) scale = below(2) == 0 ? 0.25f : 0.5f;
  const LowbitPackArgs pack{c.n, c.k, k_padded, groups, c.bits, 4};
  check::require(launch_pack_lowbit(pack, codes.data(), scales.data(), zeros.data(), packed.data(),
                                    packed_scales.data(), packed_zeros.data(), nullptr));

  const int64_t digits = c.digits == 0 ? 1 : c.digits;
  std::vector<double> values(size_t(c.m * c.k));  // of x
  std::vector<int8_t> digit_rows(size_t(c.m * digits * k_padded));
  check::Bytes x(size_t(c.m * k_padded * 2));
  for (int64_t i = 0; i < c.m * c.k; ++i) {
    const int64_t at = i / c.k * digits * k_padded + i % c.k;
    if (c.digits == 0) {
      values[size_t(i)] = double(below(17) - 8) / 8;
      write_float(x.data(), c.type, at, float(values[size_t(i)]));
      continue;
    }
    for (int64_t d = 0; d < digits; ++d) {
      const bool seldom = digits == 3 && d == 0 && i % c.k != 5;
      const int digit = seldom ? 0 : below(digits == 3 ? 5 : 31) - (digits == 3 ? 2 : 15);
      digit_rows[size_t(at + d * k_padded)] = int8_t(digit);
      values[size_t(i)] = values[size_t(i)] * 256 + digit;
    }
  }
  const std::vector<float> x_scales(size_t(c.m * groups), 0.5f);
  const check::Bytes bias = check::random_floats(c.n, c.type);
  check::Bytes y(size_t(c.m * c.n * float_size(c.type))), want(y.size());
  LowbitGemmArgs args{};
  args.m = c.m;
  args.n = c.n;
  args.k = c.k;
  args.k_padded = k_padded;
  args.group_size = c.group_size;
  args.groups = groups;
  args.bits = c.bits;
  args.digits = c.digits;
  args.x = c.digits == 0 ? static_cast<const void*>(x.data()) : digit_rows.data();
  args.x_blocks = lowbit_gemm_cuda_x_blocks(c.k);
  args.x_scales = x_scales.data();
  args.w = packed.data();
  args.w_scales = packed_scales.data();
  args.w_scales_type = FloatType::f32;
  args.w_zeros = c.zeros ? packed_zeros.data() : nullptr;
  args.bias = bias.data();
  args.y = y.data();
  args.y_type = c.type;
  std::vector<float> parts(size_t(lowbit_gemm_part_count(args, c.multiprocessors)));
  check::require(launch_lowbit_gemm(args, c.multiprocessors, parts.data(), nullptr));

  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0.0;
      for (int64_t k = 0; k < c.k; ++k) {
        const size_t group = size_t(n * groups + k / c.group_size);
        sum += scales[group] * double(codes[size_t(n * c.k + k)] - zeros[group]) *
               values[size_t(i * c.k + k)];
      }
      if (c.digits != 0) sum *= 0.5;
      write_float(want.data(), c.type, i * c.n + n,
                  float(sum) + read_float(bias.data(), c.type, n));
    }
  }
  check::report("lowbit_gemm", long(&c - kCalls), y == want);
}

void check_lowbit_gemm() {
  for (const Call& call : kCalls) check_call(call);
}

}  // namespace

int main(int count, char** arguments) {
  return ow::check::run(count, arguments, check_lowbit_gemm);
}
