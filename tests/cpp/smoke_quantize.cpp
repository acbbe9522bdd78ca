// Activation encoders and their driver.
#include <math.h>

#include "kernels/quantize/quantize.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<EncodeFn> kEncode[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_QUANTIZE_KERNELS(OW_ROW)
#undef OW_ROW
};

struct Shape {
  int64_t m, k, group_size;
};

// Ordinary values, with rows among them that cannot be scaled.
Bytes make_x(const Shape& shape, FloatType type, int64_t stride) {
  constexpr float kSpecial[] = {NAN, INFINITY, -INFINITY, 0.0f, 1e-40f, 3e38f, -1e-30f, 65504.0f};
  Bytes x;
  for (int64_t i = 0; i < shape.m; ++i) {
    const float size = ldexpf(1.0f, int(rng.below(40)) - 20);
    const int64_t special_at = rng.below(2 * shape.k);  // in half of the rows
    for (int64_t k = 0; k < (i + 1 == shape.m ? shape.k : stride); ++k) {
      const float value = k == special_at ? kSpecial[rng.below(8)] : rng.uniform() * size;
      append(&x, type, k < shape.k ? value : NAN);
    }
  }
  return x;
}

struct Outputs {
  Bytes codes, scales, sums;
  explicit Outputs(const EncodeArgs& a)
      : codes(size_t(element_count(a.blocks, a.m * a.digits)), Guarded::kPoison),
        scales(size_t(a.m * (a.digits == 1 ? 1 : div_up(a.k, a.group_size)) * 4)),
        sums(size_t(a.m * a.digits * div_up(a.k, a.group_size) * 4)) {}

  EncodeArgs plain(EncodeArgs a) {
    a.codes = reinterpret_cast<int8_t*>(codes.data());
    a.scales = reinterpret_cast<float*>(scales.data());
    a.sums = reinterpret_cast<int32_t*>(sums.data());
    return a;
  }
};

EncodeArgs make_args(const Shape& shape, FloatType type, int32_t digits, int64_t row_block,
                     int64_t k_block) {
  EncodeArgs a{};
  a.m = shape.m;
  a.k = shape.k;
  a.group_size = shape.group_size;
  a.digits = digits;
  a.blocks = {row_block, k_block, row_block == 1 ? shape.k : round_up(shape.k, 2 * k_block)};
  a.x_type = type;
  a.stride_x = shape.k;
  a.sum_factor = -8;
  return a;
}

void check_encode(const KernelEntry<EncodeFn>& entry, EncodeArgs a, const Bytes& x, bool sums,
                  Guarded* memory) {
  running = entry.name;
  a.x = x.data();
  Outputs want(a);
  encode_rows_scalar(want.plain(a), 0, a.m);
  for (const Against side : kSides) {
    memory->restart(side);
    EncodeArgs b = a;
    b.x = memory->copy(x);
    b.codes = memory->empty<int8_t>(want.codes.size());
    b.scales = memory->empty<float>(want.scales.size() / 4);
    b.sums = sums ? memory->empty<int32_t>(want.sums.size() / 4) : nullptr;
    entry.fn(b, a.m / 2, a.m);
    entry.fn(b, 0, a.m / 2);
    const bool same = memcmp(b.codes, want.codes.data(), want.codes.size()) == 0 &&
                      memcmp(b.scales, want.scales.data(), want.scales.size()) == 0 &&
                      (!sums || memcmp(b.sums, want.sums.data(), want.sums.size()) == 0);
    CHECK(same, "%s: m %d, k %d, group %d, %d digits, block %d, type %d differs", entry.name,
          int(a.m), int(a.k), int(a.group_size), a.digits, int(a.blocks.rows), int(a.x_type));
    CHECK(memory->intact(), "%s: wrote outside of its outputs", entry.name);
  }
}

void check_encode_driver() {
  const Shape shape{200, 500, 64};  // enough elements for six tasks
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    for (const int32_t digits : {1, 3}) {
      EncodeArgs a = make_args(shape, FloatType::f32, digits, 6, 16);
      const Bytes x = make_x(shape, FloatType::f32, shape.k);
      a.x = x.data();
      Outputs whole(a);
      encode_rows(whole.plain(a), Isa(tier), serial_parallel());
      for (const int64_t threads : {2, 3, 7, 100}) {
        Outputs split(a);
        encode_rows(split.plain(a), Isa(tier), reversed_parallel(threads));
        CHECK(
            split.codes == whole.codes && split.scales == whole.scales && split.sums == whole.sums,
            "encode_rows: %s, %d digits: depends on %d threads", isa_name(Isa(tier)), digits,
            int(threads));
      }
    }
  }
}

}  // namespace

void check_quantize(Guarded* memory) {
  constexpr Shape kShapes[] = {{1, 1, 1},    {2, 7, 16},   {3, 9, 9},      {5, 15, 16},
                               {6, 16, 16},  {7, 17, 16},  {4, 33, 32},    {13, 48, 48},
                               {5, 100, 64}, {9, 97, 128}, {12, 272, 272}, {3, 300, 16}};
  for (const auto& entry : kEncode) {
    if (entry.isa > detected_isa()) continue;
    for (const Shape& shape : kShapes) {
      for (const FloatType type : kTypes) {
        for (const int32_t digits : {1, 3}) {
          for (const int64_t block : {int64_t{1}, int64_t{6}, shape.m * digits}) {
            EncodeArgs a = make_args(shape, type, digits, block, block == 6 ? 64 : 16);
            a.stride_x = block == 6 ? shape.k + 3 : shape.k;
            check_encode(entry, a, make_x(shape, type, a.stride_x), block != 1, memory);
          }
        }
      }
    }
  }
  check_encode_driver();
}

}  // namespace ow::testing
