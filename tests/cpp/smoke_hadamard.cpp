// The Hadamard transform and its driver.
#include <math.h>

#include "kernels/hadamard/hadamard.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<HadamardFn> kHadamard[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_HADAMARD_KERNELS(OW_ROW)
#undef OW_ROW
};

HadamardArgs make_args(int64_t blocks, int64_t block, FloatType type, const void* x, void* y) {
  return {blocks, block, type, x, y, float(1.0 / sqrt(double(block)))};
}

// Small integers: every sum is exact, so that only the factor and the result are rounded.
void check_formula(int64_t block) {
  Bytes x;
  for (int64_t i = 0; i < block; ++i) append(&x, FloatType::f32, float(rng.below(17) - 8));
  Bytes y(x.size());
  const HadamardArgs args = make_args(1, block, FloatType::f32, x.data(), y.data());
  hadamard_scalar(args, 0, 1);
  for (int64_t i = 0; i < block; ++i) {
    float sum = 0.0f;
    for (int64_t j = 0; j < block; ++j) {
      const float value = read(x.data(), FloatType::f32, j);
      sum += __builtin_popcountll(uint64_t(i & j)) % 2 == 0 ? value : -value;
    }
    CHECK(read(y.data(), FloatType::f32, i) == sum * args.scale, "hadamard: block %d, element %d",
          int(block), int(i));
  }
}

void check_entry(const KernelEntry<HadamardFn>& entry, int64_t blocks, int64_t block,
                 FloatType type, Guarded* memory) {
  running = entry.name;
  const Bytes x = floats(blocks * block, type, 4.0f);
  Bytes want(x.size());
  hadamard_scalar(make_args(blocks, block, type, x.data(), want.data()), 0, blocks);
  for (const Against side : kSides) {
    memory->restart(side);
    const void* from = memory->copy(x);
    uint8_t* y = memory->empty<uint8_t>(want.size());
    const HadamardArgs args = make_args(blocks, block, type, from, y);
    entry.fn(args, blocks / 2, blocks);
    entry.fn(args, 0, blocks / 2);
    CHECK(memcmp(y, want.data(), want.size()) == 0, "%s: %d blocks of %d, type %d differ",
          entry.name, int(blocks), int(block), int(type));
    CHECK(memory->intact(), "%s: wrote outside of its outputs", entry.name);
  }
}

void check_driver() {
  const int64_t blocks = 37;
  const int64_t block = 4096;
  const Bytes x = floats(blocks * block, FloatType::bf16, 1.0f);
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    Bytes whole(x.size());
    hadamard(make_args(blocks, block, FloatType::bf16, x.data(), whole.data()), Isa(tier),
             serial_parallel());
    for (const int64_t threads : {2, 3, 7, 100}) {
      Bytes split(x.size());
      hadamard(make_args(blocks, block, FloatType::bf16, x.data(), split.data()), Isa(tier),
               reversed_parallel(threads));
      CHECK(split == whole, "hadamard: %s depends on %d threads", isa_name(Isa(tier)),
            int(threads));
    }
  }
}

}  // namespace

void check_hadamard(Guarded* memory) {
  for (const int64_t block : {1, 2, 16, 64, 1024}) check_formula(block);
  for (const auto& entry : kHadamard) {
    if (entry.isa > detected_isa()) continue;
    for (int64_t block = 1; block <= kMaxHadamard; block *= 2) {
      for (const FloatType type : kTypes) {
        for (const int64_t blocks : {1, 2, 7}) check_entry(entry, blocks, block, type, memory);
      }
    }
  }
  check_driver();
}

}  // namespace ow::testing
