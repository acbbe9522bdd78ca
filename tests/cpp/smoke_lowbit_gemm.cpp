// lowbit_gemm kernels, their driver, packing, and rows of the weight.
#include <math.h>

#include "kernels/lowbit_gemm/lowbit_gemm.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<LowbitGemmFn> kGemm[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_LOWBIT_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};

// The operands of one call, in plain memory.
struct Gemm {
  LowbitGemmArgs args{};
  Bytes codes, bf16_rows;  // [n, k] and [m, k], for the bf16 reference
  Bytes x, w, w_scales, w_zeros, bias, add;
  std::vector<float> x_scales;
  std::vector<int32_t> x_sums;
  size_t y_bytes() const { return size_t(args.m * args.n * float_size(args.y_type)); }
};

struct Shape {
  int64_t m, n, k, group_size;
};

void fill_weight(Gemm* p, bool symmetric) {
  LowbitGemmArgs& a = p->args;
  // Padding outputs hold anything, and scales that are NaN: kernels must not let them out.
  const int64_t rows = round_up(a.n, kPanel);
  const int64_t cells = rows * a.groups;
  Bytes codes, scales, zeros;
  for (int64_t i = 0; i < rows * a.k; ++i) codes.push_back(uint8_t(rng.below(1 << a.bits)));
  for (int64_t i = 0; i < cells; ++i) {
    append(&scales, a.w_scales_type, i < a.n * a.groups ? 0.6f + 0.5f * rng.uniform() : NAN);
    zeros.push_back(uint8_t(rng.below(1 << a.bits)));
  }
  p->w.resize(size_t(rows / kPanel * panel_bytes(a.bits, a.k_padded)));
  p->w_scales.resize(scales.size());
  p->w_zeros.resize(symmetric ? 0 : zeros.size());
  pack_lowbit({rows, a.k, a.k_padded, a.groups, a.bits, float_size(a.w_scales_type)}, codes.data(),
              scales.data(), symmetric ? nullptr : zeros.data(), p->w.data(), p->w_scales.data(),
              p->w_zeros.data(), serial_parallel());
  p->codes = codes;
  a.w = p->w.data();
  a.w_scales = p->w_scales.data();
  a.w_zeros = symmetric ? nullptr : p->w_zeros.data();
}

// Rows of bf16, and the same in blocks.
void fill_bf16_x(Gemm* p) {
  LowbitGemmArgs& a = p->args;
  p->bf16_rows = floats(a.m * a.k, FloatType::bf16, 1.0f);
  p->x.resize(size_t(element_count(a.x_blocks, a.m) * 2), Guarded::kPoison);
  for (int64_t row = 0; row < a.m; ++row) {
    for (int64_t k = 0; k < a.x_blocks.k_padded; ++k) {
      uint8_t* to = p->x.data() + 2 * element_at(a.x_blocks, row, k);
      if (k < a.k) {
        memcpy(to, p->bf16_rows.data() + 2 * (row * a.k + k), 2);
      } else {
        memset(to, 0, 2);
      }
    }
  }
  a.x = p->x.data();
}

// x as digit rows in blocks; with digits = 0, as rows of bf16 in blocks.
void fill_x(Gemm* p) {
  LowbitGemmArgs& a = p->args;
  if (a.digits == 0) return fill_bf16_x(p);
  const int64_t rows = a.m * a.digits;
  const int64_t factor = lowbit_sum_factor(a.bits, a.w_zeros == nullptr);
  p->x.resize(size_t(element_count(a.x_blocks, rows)), 0x55);
  p->x_sums.resize(size_t(rows * a.groups));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < a.x_blocks.k_padded; ++k) {
      const int8_t digit = k < a.k ? int8_t(rng.below(256) - 128) : int8_t{0};
      p->x[size_t(element_at(a.x_blocks, r, k))] = uint8_t(digit);
      if (k < a.k) p->x_sums[size_t(r * a.groups + k / a.group_size)] += int32_t(factor * digit);
    }
  }
  for (int64_t i = 0; i < a.m * (a.digits == 3 ? a.groups : 1); ++i) {
    p->x_scales.push_back(a.digits == 3 ? ldexpf(1.0f, int(rng.below(8)) - 24) : 0.01f);
  }
  a.x = p->x.data();
  a.x_scales = p->x_scales.data();
  a.x_sums = p->x_sums.data();
}

// `variant` picks the types and the optional terms.
Gemm make_gemm(Shape shape, int32_t bits, int32_t digits, const RowBlocks& x_blocks, int variant) {
  Gemm p;
  LowbitGemmArgs& a = p.args;
  a.m = shape.m;
  a.n = shape.n;
  a.k = shape.k;
  a.k_padded = round_up(shape.k, kPadK);
  a.group_size = shape.group_size;
  a.groups = div_up(shape.k, shape.group_size);
  a.bits = bits;
  a.digits = digits;
  a.x_blocks = x_blocks;
  a.w_scales_type = kTypes[variant % 3];
  a.y_type = kTypes[variant / 2 % 3];
  fill_weight(&p, variant % 2 == 0);
  fill_x(&p);
  p.bias = floats(a.n, a.y_type, 1.0f);
  p.add = floats(a.m * a.n, a.y_type, 1.0f);
  return p;
}

// Vectors have moved since the pointers were taken.
LowbitGemmArgs plain_args(const Gemm& p, int variant, void* y) {
  LowbitGemmArgs a = p.args;
  a.bias = variant / 3 % 2 == 0 ? p.bias.data() : nullptr;
  a.add = variant / 4 % 2 == 0 ? p.add.data() : nullptr;
  a.y = y;
  return a;
}
LowbitGemmArgs guarded_args(const Gemm& p, int variant, Guarded* memory) {
  LowbitGemmArgs a = plain_args(p, variant, memory->empty<uint8_t>(p.y_bytes()));
  a.x = memory->copy(p.x);
  a.w = memory->copy(p.w);
  a.w_scales = memory->copy(p.w_scales);
  if (a.w_zeros != nullptr) a.w_zeros = memory->copy(p.w_zeros);
  if (a.x_scales != nullptr) a.x_scales = memory->copy(p.x_scales);
  if (a.x_sums != nullptr) a.x_sums = memory->copy(p.x_sums);
  if (a.bias != nullptr) a.bias = memory->copy(p.bias);
  if (a.add != nullptr) a.add = memory->copy(p.add);
  return a;
}

// The formula for bf16 x, in double: within k + groups + 8 roundings of the magnitudes added.
bool close_to_formula(const Gemm& p, const LowbitGemmArgs& a) {
  for (int64_t i = 0; i < a.m * a.n; ++i) {
    const int64_t row = i / a.n;
    const int64_t n = i % a.n;
    double total = 0.0;
    double size = 0.0;
    for (int64_t k = 0; k < a.k; ++k) {
      const int64_t at = (n / kPanel * a.groups + k / a.group_size) * kPanel + n % kPanel;
      const int zero = a.w_zeros == nullptr ? 1 << (a.bits - 1) : p.w_zeros[size_t(at)];
      const double term = double(read(p.w_scales.data(), a.w_scales_type, at)) *
                          (p.codes[size_t(n * a.k + k)] - zero) *
                          read(p.bf16_rows.data(), FloatType::bf16, row * a.k + k);
      total += term;
      size += fabs(term);
    }
    for (const double term : {a.bias == nullptr ? 0.0 : double(read(a.bias, a.y_type, n)),
                              a.add == nullptr ? 0.0 : double(read(a.add, a.y_type, i))}) {
      total += term;
      size += fabs(term);
    }
    const double error = double(a.k + a.groups + 8) * 0x1p-24 * size;
    const double rounded = error + double(roundoff(a.y_type)) * (fabs(total) + error) + 0x1p-25;
    if (!(fabs(double(read(a.y, a.y_type, i)) - total) <= rounded)) return false;
  }
  return true;
}

void check_gemm(const KernelEntry<LowbitGemmFn>& entry, Shape shape, int32_t digits, int variant,
                Guarded* memory) {
  running = entry.name;
  const int32_t bits = layout_info(entry.key / 2)->bits;
  const RowBlocks blocks = lowbit_gemm_x_blocks(entry, shape.m, digits, shape.k);
  Gemm p = make_gemm(shape, bits, digits, blocks, variant);
  const int64_t panels = div_up(shape.n, kPanel);
  Bytes want(p.y_bytes());
  if (digits != 0) lowbit_gemm_rows_scalar(plain_args(p, variant, want.data()), 0, panels);
  for (const Against side : kSides) {
    memory->restart(side);
    const LowbitGemmArgs a = guarded_args(p, variant, memory);
    // In two calls, the later panels first: a call must keep to its own.
    const int64_t middle = panels / 2;
    entry.fn(a, middle, panels);
    entry.fn(a, 0, middle);
    const bool same =
        digits == 0 ? close_to_formula(p, a) : memcmp(a.y, want.data(), want.size()) == 0;
    CHECK(same, "%s: %d bits, %d digits, m %d, n %d, k %d, group %d, variant %d differs",
          entry.name, bits, digits, int(shape.m), int(shape.n), int(shape.k), int(shape.group_size),
          variant);
    CHECK(memory->intact(), "%s: wrote outside of y", entry.name);
  }
}

void check_gemm_kernels(Guarded* memory) {
  constexpr Shape kShapes[] = {
      {1, 1, 1, 16},    {1, 33, 17, 16},    {2, 31, 33, 32},   {3, 16, 100, 32},   {4, 17, 48, 16},
      {5, 32, 15, 15},  {6, 63, 272, 128},  {7, 65, 272, 272}, {8, 64, 31, 64},    {9, 15, 256, 64},
      {12, 33, 64, 64}, {13, 97, 130, 130}, {24, 16, 32, 16},  {25, 40, 100, 100}, {65, 33, 48, 16},
      {97, 20, 33, 16}, {193, 33, 40, 40}};
  int variant = 0;
  for (const auto& entry : kGemm) {
    if (entry.isa > detected_isa()) continue;
    for (const Shape& shape : kShapes) {
      for (const int32_t digits : {0, 1, 3}) {
        if ((digits == 0) != (entry.key % 2 == 1) || shape.m * digits > entry.max_m) continue;
        // Steps of 5 walk through symmetry, types and terms out of step with each other.
        for (int i = 0; i < 3; ++i) check_gemm(entry, shape, digits, variant += 5, memory);
      }
    }
  }
}

void check_gemm_driver() {
  // 11 tiles of outputs; enough work for seven tasks.
  const Shape shape{9, 700, 300, 64};
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    const Isa isa = Isa(tier);
    for (const int32_t digits : {0, 1, 3}) {
      if (digits == 0 && isa < Isa::avx512bf16) continue;
      const RowBlocks blocks = lowbit_gemm_x_blocks(isa, shape.m, digits, shape.k);
      Gemm p = make_gemm(shape, 4, digits, blocks, 1);
      Bytes whole(p.y_bytes());
      lowbit_gemm(plain_args(p, 1, whole.data()), isa, serial_parallel());
      for (const int64_t threads : {2, 3, 7, 100}) {
        Bytes split(p.y_bytes(), Guarded::kPoison);
        lowbit_gemm(plain_args(p, 1, split.data()), isa, reversed_parallel(threads));
        CHECK(split == whole, "lowbit_gemm: %s, %d digits: depends on %d threads", isa_name(isa),
              digits, int(threads));
      }
    }
  }
}

void check_packing(Guarded* memory) {
  for (const int32_t bits : {2, 3, 4, 8}) {
    for (const Shape& shape : {Shape{0, 1, 1, 16}, Shape{0, 33, 100, 32}, Shape{0, 64, 48, 48}}) {
      for (const bool symmetric : {true, false}) {
        const LowbitPackArgs a{
            shape.n, shape.k, round_up(shape.k, kPadK), div_up(shape.k, shape.group_size), bits, 2};
        const int64_t cells = round_up(a.n, kPanel) * a.groups;
        Bytes codes, zeros;
        for (int64_t i = 0; i < a.n * a.k; ++i) codes.push_back(uint8_t(rng.below(1 << bits)));
        for (int64_t i = 0; i < a.n * a.groups; ++i) zeros.push_back(uint8_t(rng.below(1 << bits)));
        const Bytes scales = floats(a.n * a.groups, FloatType::f16, 1.0f);
        for (const Against side : kSides) {
          memory->restart(side);
          const size_t bytes = size_t(div_up(a.n, kPanel) * panel_bytes(bits, a.k_padded));
          uint8_t* packed = memory->empty<uint8_t>(bytes);
          uint8_t* packed_scales = memory->empty<uint8_t>(size_t(cells) * 2);
          uint8_t* packed_zeros = symmetric ? nullptr : memory->empty<uint8_t>(size_t(cells));
          pack_lowbit(a, memory->copy(codes), memory->copy(scales),
                      symmetric ? nullptr : memory->copy(zeros), packed, packed_scales,
                      packed_zeros, reversed_parallel(3));
          uint8_t* codes_out = memory->empty<uint8_t>(codes.size());
          uint8_t* scales_out = memory->empty<uint8_t>(scales.size());
          uint8_t* zeros_out = symmetric ? nullptr : memory->empty<uint8_t>(zeros.size());
          unpack_lowbit(a, packed, packed_scales, packed_zeros, codes_out, scales_out, zeros_out,
                        reversed_parallel(3));
          CHECK(memcmp(codes_out, codes.data(), codes.size()) == 0, "%d bits: codes", bits);
          CHECK(memcmp(scales_out, scales.data(), scales.size()) == 0, "%d bits: scales", bits);
          CHECK(symmetric || memcmp(zeros_out, zeros.data(), zeros.size()) == 0, "%d bits: zeros",
                bits);
          CHECK(memory->intact(), "%d bits: packing wrote outside of its outputs", bits);
        }
      }
    }
  }
}

// Rows of bf16 into blocks, as the kernels' own tests lay them out. What lies past the last row of
// the last block is left alone.
void check_bf16_blocks(Guarded* memory) {
  running = "block_bf16_rows";
  for (const Shape& shape : {Shape{1, 1, 1, 16}, Shape{6, 1, 32, 32}, Shape{13, 1, 75, 16}}) {
    const RowBlocks blocks{kTileRowBlock, kUnit, round_up(shape.k, kPadK)};
    const Gemm p = make_gemm(shape, 4, 0, blocks, 0);
    for (const Against side : kSides) {
      memory->restart(side);
      uint8_t* out = memory->empty<uint8_t>(p.x.size());
      const uint8_t* rows = memory->copy(p.bf16_rows);
      block_bf16_rows(reinterpret_cast<const bf16*>(rows), p.args.m, p.args.k, blocks,
                      reinterpret_cast<bf16*>(out), reversed_parallel(3));
      CHECK(memcmp(out, p.x.data(), p.x.size()) == 0, "block_bf16_rows: %d x %d", int(shape.m),
            int(shape.k));
      CHECK(memory->intact(), "block_bf16_rows: wrote outside of its output");
    }
  }
}

// Rows of the weight, to the bit: one product in fp32, rounded once.
void check_rows_of(const Gemm& p, const std::vector<int64_t>& rows, FloatType type,
                   Guarded* memory) {
  const LowbitGemmArgs& weight = p.args;
  const int32_t bits = weight.bits;
  Bytes want;
  for (const int64_t n : rows) {
    for (int64_t k = 0; k < weight.k; ++k) {
      const int64_t at = (n / kPanel * weight.groups + k / weight.group_size) * kPanel + n % kPanel;
      const int zero = weight.w_zeros == nullptr ? 1 << (bits - 1) : p.w_zeros[size_t(at)];
      const float scale = read(p.w_scales.data(), weight.w_scales_type, at);
      append(&want, type, scale * float(p.codes[size_t(n * weight.k + k)] - zero));
    }
  }
  for (const Against side : kSides) {
    memory->restart(side);
    uint8_t* y = memory->empty<uint8_t>(want.size());
    LowbitRowsArgs a{};
    a.count = int64_t(rows.size());
    a.rows = memory->copy(rows);
    a.k = weight.k;
    a.k_padded = weight.k_padded;
    a.group_size = weight.group_size;
    a.groups = weight.groups;
    a.bits = bits;
    a.w = memory->copy(p.w);
    a.w_scales = memory->copy(p.w_scales);
    a.w_scales_type = weight.w_scales_type;
    a.w_zeros = weight.w_zeros == nullptr ? nullptr : memory->copy(p.w_zeros);
    a.y = y;
    a.y_type = type;
    lowbit_rows(a, reversed_parallel(3));
    CHECK(memcmp(y, want.data(), want.size()) == 0, "%d bits: %d rows of %d x %d", bits,
          int(rows.size()), int(weight.n), int(weight.k));
    CHECK(memory->intact(), "%d bits: lowbit_rows wrote outside of y", bits);
  }
}

void check_rows(Guarded* memory) {
  running = "lowbit_rows";
  int variant = 0;
  for (const int32_t bits : {2, 3, 4, 8}) {
    for (const Shape& shape : {Shape{1, 1, 1, 16}, Shape{1, 33, 100, 32}, Shape{1, 70, 48, 48}}) {
      const Gemm p = make_gemm(shape, bits, 1, {1, kUnit, round_up(shape.k, kPadK)}, ++variant);
      const int64_t last = shape.n - 1;
      std::vector<int64_t> many{last, 0, last};
      while (many.size() < 13) many.push_back(rng.below(shape.n));  // work for three tasks
      for (const FloatType type : kTypes) {
        check_rows_of(p, {last}, type, memory);
        check_rows_of(p, many, type, memory);
      }
    }
  }
}

}  // namespace

void check_lowbit_gemm(Guarded* memory) {
  check_gemm_kernels(memory);
  check_gemm_driver();
  check_packing(memory);
  check_bf16_blocks(memory);
  check_rows(memory);
}

}  // namespace ow::testing
