// The elementwise kernels and their drivers.
#include <math.h>

#include "kernels/activations/activations.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<const ActivationKernels*> kActivations[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_ACTIVATIONS_KERNELS(OW_ROW)
#undef OW_ROW
};

constexpr int64_t kWidths[] = {1, 7, 8, 9, 15, 16, 17, 31, 33, 100};

// Tiers add in other orders and fuse differently: a few fp32 roundings of `size`, and one of the
// output's type on either side. The formulas themselves are tested in tests/kernels.
bool close(const void* got, const Bytes& want, FloatType type, double size) {
  for (int64_t i = 0; i < int64_t(want.size()) / float_size(type); ++i) {
    const double a = double(read(got, type, i));
    const double b = double(read(want.data(), type, i));
    if (!(fabs(a - b) <= 64 * 0x1p-24 * size + 2 * double(roundoff(type)) * fabs(b) + 0x1p-24)) {
      return false;
    }
  }
  return true;
}

// Runs `call(kernels, inputs, y)` with the scalar kernels in plain memory and with `entry` against
// the guards.
template <class Call>
void compare(const KernelEntry<const ActivationKernels*>& entry, const char* what, FloatType type,
             const std::vector<Bytes>& inputs, int64_t outputs, double size, Guarded* memory,
             const Call& call) {
  running = entry.name;
  std::vector<const uint8_t*> pointers;
  for (const Bytes& input : inputs) pointers.push_back(input.data());
  Bytes want(size_t(outputs * float_size(type)));
  call(activations_scalar, pointers, want.data());
  for (const Against side : kSides) {
    memory->restart(side);
    pointers.clear();
    for (const Bytes& input : inputs) pointers.push_back(memory->copy(input));
    uint8_t* y = memory->empty<uint8_t>(want.size());
    call(*entry.fn, pointers, y);
    CHECK(close(y, want, type, size), "%s: %s of %d outputs, type %d differs", entry.name, what,
          int(outputs), int(type));
    CHECK(memory->intact(), "%s: %s wrote outside of y", entry.name, what);
  }
}

const float* as_floats(const uint8_t* p) { return reinterpret_cast<const float*>(p); }

void check_kernels(const KernelEntry<const ActivationKernels*>& entry, FloatType type, int64_t d,
                   Guarded* memory) {
  using Pointers = std::vector<const uint8_t*>;
  const int64_t m = 3;
  compare(entry, "rms_norm", type, {floats(m * d, type, 3.0f), floats(d, type, 2.0f)}, m * d,
          2.0 * sqrt(double(d)), memory,
          [&](const ActivationKernels& kernels, const Pointers& in, void* y) {
            const RmsNormArgs a{m, d, type, in[0], in[1], 1e-5f, y};
            kernels.rms_norm(a, 1, m);
            kernels.rms_norm(a, 0, 1);
          });
  compare(entry, "silu_mul", type, {floats(m * 2 * d, type, 9.0f)}, m * d, 81.0, memory,
          [&](const ActivationKernels& kernels, const Pointers& in, void* y) {
            const SiluMulArgs a{m, d, type, in[0], y};
            kernels.silu_mul(a, 1, m);
            kernels.silu_mul(a, 0, 1);
          });
  // Heads 1 .. 3 of four, the last one not turned, to a y of [b, h, t, 2d].
  const int64_t b = 2, t = 3, h = 3;
  RopeArgs rope{};
  rope.b = b;
  rope.t = t;
  rope.h = h;
  rope.d = 2 * d;
  rope.turned = h - 1;
  rope.type = type;
  rope.x_strides = {t * 4 * 2 * d, 4 * 2 * d, 2 * d};
  rope.y_strides = {h * t * 2 * d, 2 * d, t * 2 * d};
  compare(entry, "rope", type,
          {floats(b * t * 4 * 2 * d, type, 3.0f), floats(t * d, FloatType::f32, 1.0f),
           floats(t * d, FloatType::f32, 1.0f)},
          b * t * h * 2 * d, 6.0, memory,
          [&](const ActivationKernels& kernels, const Pointers& in, void* y) {
            RopeArgs a = rope;
            a.x = in[0] + 2 * d * float_size(type);
            a.cos = as_floats(in[1]);
            a.sin = as_floats(in[2]);
            a.y = y;
            kernels.rope(a, 1, b * t);
            kernels.rope(a, 0, 1);
          });
}

void check_drivers() {
  const int64_t m = 70, d = 1000;  // enough elements for four tasks
  const FloatType type = FloatType::f32;
  const Bytes x = floats(m * 2 * d, type, 3.0f);
  const Bytes w = floats(d, type, 1.0f);
  const auto run = [&](Isa isa, const Parallel& parallel) {
    Bytes y(size_t(m * d * 4 * 3));
    rms_norm({m, d, type, x.data(), w.data(), 1e-5f, y.data()}, isa, parallel);
    silu_mul({m, d, type, x.data(), y.data() + m * d * 4}, isa, parallel);
    RopeArgs turn{};
    turn.b = 2;
    turn.t = m / 2;
    turn.h = turn.turned = 1;
    turn.d = d;
    turn.type = type;
    turn.x = x.data();
    turn.x_strides = turn.y_strides = {m / 2 * d, d, d};
    turn.cos = as_floats(x.data());
    turn.sin = turn.cos + m / 2 * d / 2;
    turn.y = y.data() + 2 * m * d * 4;
    rope(turn, isa, parallel);
    return y;
  };
  for (int tier = 0; tier <= int(detected_isa()); ++tier) {
    const Bytes whole = run(Isa(tier), serial_parallel());
    for (const int64_t threads : {2, 3, 7}) {
      CHECK(run(Isa(tier), reversed_parallel(threads)) == whole,
            "activations: %s: depends on %d threads", isa_name(Isa(tier)), int(threads));
    }
  }
}

}  // namespace

void check_activations(Guarded* memory) {
  for (const auto& entry : kActivations) {
    if (entry.isa > detected_isa()) continue;
    for (const FloatType type : kTypes) {
      for (const int64_t d : kWidths) check_kernels(entry, type, d, memory);
    }
  }
  check_drivers();
}

}  // namespace ow::testing
