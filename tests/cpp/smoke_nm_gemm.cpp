// nm_gemm kernels, their driver, and packing.
#include <math.h>

#include "kernels/nm_gemm/nm_gemm.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<const NmGemmKernels*> kKernels[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_NM_GEMM_KERNELS(OW_ROW)
#undef OW_ROW
};

struct Shape {
  int64_t m, n, k, group_size;
  int32_t kept, block, vector;
};

// The operands of one call, in plain memory.
struct Gemm {
  NmGemmArgs args{};
  Bytes weight, mask, scales;  // dense, for the formula
  Bytes x, values, index, packed_scales, bias, add;
  std::vector<float> x_scales;

  size_t y_bytes() const { return size_t(args.m * args.n * float_size(args.y_type)); }
  NmPackArgs pack() const {
    const bool ints = args.bits <= 8;
    return {args.n,
            args.k,
            args.kept,
            args.block,
            args.vector,
            args.bits,
            ints ? args.groups : 0,
            ints ? float_size(args.scales_type) : 0,
            weight.data(),
            mask.data(),
            ints ? scales.data() : nullptr};
  }
};

// Keeps `kept` random columns of each block, the same for each `vector` outputs.
void fill_mask(Gemm* p) {
  const NmGemmArgs& a = p->args;
  p->mask.assign(size_t(a.n * a.k), 0);
  for (int64_t n = 0; n < a.n; n += a.vector) {
    for (int64_t block = 0; block < a.k; block += a.block) {
      for (int32_t i = 0; i < a.kept; ++i) {
        const int64_t k = block + rng.below(a.block);
        for (int64_t row = n; row < min_of(n + a.vector, a.n) && k < a.k; ++row) {
          p->mask[size_t(row * a.k + k)] = 1;
        }
      }
    }
  }
}

void fill_weight(Gemm* p) {
  NmGemmArgs& a = p->args;
  fill_mask(p);
  if (a.bits <= 8) {
    for (int64_t i = 0; i < a.n * a.k; ++i) p->weight.push_back(uint8_t(rng.below(1 << a.bits)));
    p->scales = floats(a.n * a.groups, a.scales_type, 0.5f);
  } else {
    p->weight = floats(a.n * a.k, a.bits == 32 ? FloatType::f32 : FloatType::bf16, 1.0f);
  }
  const int64_t panels = div_up(a.n, kNmPanel);
  p->values.resize(size_t(panels * nm_units(a) * nm_unit_value_bytes(a.bits)));
  p->index.resize(size_t(div_up(a.n, nm_index_outputs(a.vector)) * nm_units(a) *
                         nm_unit_index_bytes(a.block, a.vector)));
  p->packed_scales.resize(size_t(panels * a.groups * kNmPanel * p->pack().scale_size));
  compress_nm(p->pack(), p->values.data(), p->index.data(), p->packed_scales.data(),
              reversed_parallel(3));
}

// Of 6 variants, those that make x and y bf16: this one and the next.
constexpr int kBf16 = 2;

// `variant` picks the types and the optional terms.
Gemm make_gemm(const Shape& shape, int32_t bits, bool int8, int variant) {
  Gemm p;
  NmGemmArgs& a = p.args;
  a.m = shape.m;
  a.n = shape.n;
  a.k = shape.k;
  a.kept = shape.kept;
  a.block = shape.block;
  a.vector = shape.vector;
  a.bits = bits;
  a.int8 = int8;
  a.group_size = bits <= 8 ? shape.group_size : shape.k;
  a.groups = div_up(shape.k, a.group_size);
  a.scales_type = kTypes[variant % 3];
  a.y_type = kTypes[variant / 2 % 3];
  fill_weight(&p);
  if (int8) {
    for (int64_t i = 0; i < a.m * a.k; ++i) p.x.push_back(uint8_t(rng.below(255) - 127));
    for (int64_t i = 0; i < a.m; ++i) p.x_scales.push_back(0.01f);
  } else {
    p.x = floats(a.m * a.k, a.y_type, 1.0f);
  }
  p.bias = floats(a.n, a.y_type, 1.0f);
  p.add = floats(a.m * a.n, a.y_type, 1.0f);
  return p;
}

NmGemmArgs guarded_args(const Gemm& p, int variant, int64_t laid_bytes, Guarded* memory) {
  NmGemmArgs a = p.args;
  a.x = memory->copy(p.x);
  a.values = memory->copy(p.values);
  a.index = memory->copy(p.index);
  a.scales = a.bits <= 8 ? memory->copy(p.packed_scales) : nullptr;
  a.x_scales = a.int8 ? memory->copy(p.x_scales) : nullptr;
  a.bias = variant / 3 % 2 == 0 ? memory->copy(p.bias) : nullptr;
  a.add = variant / 4 % 2 == 0 ? memory->copy(p.add) : nullptr;
  a.laid = memory->empty<uint8_t>(size_t(laid_bytes));
  a.y = memory->empty<uint8_t>(p.y_bytes());
  return a;
}

double weight_at(const Gemm& p, int64_t n, int64_t k) {
  const NmGemmArgs& a = p.args;
  const int64_t at = n * a.k + k;
  if (p.mask[size_t(at)] == 0) return 0.0;
  if (a.bits == 32) return double(read(p.weight.data(), FloatType::f32, at));
  if (a.bits == 16) return double(read(p.weight.data(), FloatType::bf16, at));
  const float scale = read(p.scales.data(), a.scales_type, n * a.groups + k / a.group_size);
  return double(scale) * (p.weight[size_t(at)] - (1 << (a.bits - 1)));
}

// The formula in double: within one rounding a slot, two a group, and 8 of the magnitudes added.
bool close_to_formula(const Gemm& p, const NmGemmArgs& a) {
  const int64_t slots = nm_slots(a.k, a.kept, a.block);
  for (int64_t i = 0; i < a.m * a.n; ++i) {
    const int64_t row = i / a.n;
    const int64_t n = i % a.n;
    double total = 0.0;
    double size = 0.0;
    for (int64_t k = 0; k < a.k; ++k) {
      const int64_t at = row * a.k + k;
      const double x = a.int8 ? int8_t(p.x[size_t(at)]) * double(p.x_scales[size_t(row)])
                              : double(read(p.x.data(), a.y_type, at));
      total += x * weight_at(p, n, k);
      size += fabs(x * weight_at(p, n, k));
    }
    for (const double term : {a.bias == nullptr ? 0.0 : double(read(a.bias, a.y_type, n)),
                              a.add == nullptr ? 0.0 : double(read(a.add, a.y_type, i))}) {
      total += term;
      size += fabs(term);
    }
    const double error = double(slots + 2 * a.groups + 8) * 0x1p-24 * size;
    const double rounded = error + double(roundoff(a.y_type)) * (fabs(total) + error) + 0x1p-25;
    if (!(fabs(double(read(a.y, a.y_type, i)) - total) <= rounded)) return false;
  }
  return true;
}

void check_kernel(const KernelEntry<const NmGemmKernels*>& entry, const Shape& shape, int variant,
                  Guarded* memory) {
  running = entry.name;
  const int32_t bits = layout_info(entry.key / 2)->bits;
  const Gemm p = make_gemm(shape, bits, entry.key % 2 == 1, variant);
  if (shape.m > entry.max_m) return;
  if (nm_tier(p.args, entry.isa) != entry.isa) return;
  const NmGemmKernels& kernels = *entry.fn;
  for (const Against side : kSides) {
    memory->restart(side);
    const NmGemmArgs a = guarded_args(p, variant, kernels.laid_bytes(p.args), memory);
    // In two calls each, the later part first: a call must keep to its own.
    const int64_t blocks = div_up(a.m, kernels.row_block);
    kernels.lay_out(a, blocks / 2, blocks);
    kernels.lay_out(a, 0, blocks / 2);
    const int64_t panels = div_up(a.n, kNmPanel);
    kernels.multiply(a, panels / 2, panels);
    kernels.multiply(a, 0, panels / 2);
    CHECK(close_to_formula(p, a),
          "%s: %d bits, m %d, n %d, k %d, group %d, %d:%d, vector %d, variant %d differs",
          entry.name, bits, int(shape.m), int(shape.n), int(shape.k), int(shape.group_size),
          int(shape.kept), int(shape.block), int(shape.vector), variant);
    CHECK(memory->intact(), "%s: wrote outside of y", entry.name);
  }
}

constexpr Shape kShapes[] = {
    {1, 1, 1, 32, 2, 4, 1},      {1, 33, 100, 32, 2, 4, 1},   {2, 31, 130, 64, 2, 4, 8},
    {3, 16, 70, 128, 2, 4, 16},  {4, 65, 128, 32, 2, 4, 32},  {5, 17, 75, 64, 1, 4, 1},
    {8, 20, 64, 64, 3, 4, 1},    {9, 47, 150, 128, 4, 8, 8},  {17, 33, 90, 90, 5, 8, 1},
    {6, 33, 96, 32, 7, 16, 16},  {20, 18, 200, 64, 1, 16, 1}, {7, 40, 300, 128, 2, 32, 32},
    {1, 17, 65, 65, 1, 32, 1},   {3, 17, 64, 32, 31, 32, 8},  {131, 20, 40, 32, 2, 4, 1},
    {40, 270, 36, 32, 2, 4, 16}, {70, 35, 300, 64, 2, 4, 1},  {139, 34, 530, 64, 3, 8, 8}};

void check_driver() {
  const Shape shape{9, 700, 300, 64, 2, 4, 1};
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    for (const int32_t bits : {4, 8, 16}) {
      const bool int8 = bits == 8;
      Gemm p = make_gemm(shape, bits, int8, kBf16);
      NmGemmArgs a = p.args;
      a.x = p.x.data();
      a.x_scales = p.x_scales.data();
      a.values = p.values.data();
      a.index = p.index.data();
      a.scales = p.packed_scales.data();
      Bytes laid(size_t(nm_laid_bytes(a, Isa(tier))));
      a.laid = laid.data();
      Bytes whole(p.y_bytes());
      a.y = whole.data();
      nm_gemm(a, Isa(tier), serial_parallel());
      for (const int64_t threads : {2, 3, 7, 100}) {
        Bytes split(p.y_bytes(), Guarded::kPoison);
        a.y = split.data();
        nm_gemm(a, Isa(tier), reversed_parallel(threads));
        CHECK(split == whole, "nm_gemm: %s depends on %d threads", isa_name(Isa(tier)),
              int(threads));
      }
    }
  }
}

void check_packing(Guarded* memory) {
  running = "compress_nm";
  for (const Shape& shape : kShapes) {
    for (const int32_t bits : {4, 8, 16, 32}) {
      const Gemm p = make_gemm(shape, bits, false, 0);
      const int64_t size = div_up(bits, 8);
      Bytes want = p.weight;  // with zeros where nothing is kept
      for (size_t i = 0; i < p.mask.size(); ++i) {
        const int zero = bits <= 8 ? 1 << (bits - 1) : 0;
        if (p.mask[i] == 0) memset(want.data() + i * size_t(size), zero, size_t(size));
      }
      for (const Against side : kSides) {
        memory->restart(side);
        NmPackArgs pack = p.pack();
        pack.weight = memory->copy(p.weight);
        pack.mask = memory->copy(p.mask);
        if (pack.scales != nullptr) pack.scales = memory->copy(p.scales);
        uint8_t* values = memory->empty<uint8_t>(p.values.size());
        uint8_t* index = memory->empty<uint8_t>(p.index.size());
        uint8_t* scales = memory->empty<uint8_t>(p.packed_scales.size());
        CHECK(find_nm_excess(pack).count == 0, "find_nm_excess: finds what is not there");
        compress_nm(pack, values, index, scales, reversed_parallel(3));
        uint8_t* weight_out = memory->empty<uint8_t>(p.weight.size());
        uint8_t* scales_out = memory->empty<uint8_t>(p.scales.size());
        expand_nm(pack, values, index, bits <= 8 ? scales : nullptr, weight_out, scales_out,
                  reversed_parallel(3));
        CHECK(memcmp(weight_out, want.data(), want.size()) == 0, "%d bits: weight", bits);
        CHECK(bits > 8 || memcmp(scales_out, p.scales.data(), p.scales.size()) == 0,
              "%d bits: scales", bits);
        CHECK(memory->intact(), "%d bits: packing wrote outside of its outputs", bits);
      }
    }
  }
}

// A kernel must not leave x whatever the index holds.
void check_any_index(Guarded* memory) {
  for (const auto& entry : kKernels) {
    if (entry.isa > detected_isa()) continue;
    running = entry.name;
    for (const Shape& shape : kShapes) {
      const int variant = entry.isa > Isa::avx512 ? kBf16 : 0;
      Gemm p = make_gemm(shape, layout_info(entry.key / 2)->bits, entry.key % 2 == 1, variant);
      if (shape.m > entry.max_m) continue;
      if (nm_tier(p.args, entry.isa) != entry.isa) continue;
      for (uint8_t& byte : p.index) byte = uint8_t(rng.below(256));
      memory->restart(Against::end);
      const NmGemmArgs a = guarded_args(p, variant, entry.fn->laid_bytes(p.args), memory);
      entry.fn->lay_out(a, 0, div_up(a.m, entry.fn->row_block));
      entry.fn->multiply(a, 0, div_up(a.n, kNmPanel));
      CHECK(memory->intact(), "%s: wrote outside of y", entry.name);
    }
  }
}

}  // namespace

void check_nm_gemm(Guarded* memory) {
  int variant = 0;
  for (const auto& entry : kKernels) {
    if (entry.isa > detected_isa()) continue;
    for (const Shape& shape : kShapes) {
      variant += 5;
      // Above avx512 kernels read bf16 only.
      const int of_bf16 = variant / 6 * 6 + kBf16 + variant % 2;
      check_kernel(entry, shape, entry.isa > Isa::avx512 ? of_bf16 : variant, memory);
    }
  }
  check_any_index(memory);
  check_driver();
  check_packing(memory);
}

}  // namespace ow::testing
