// Rows of activations to int8 on a GPU. Every number equals the CPU's. A thread takes eight
// neighbours at a time; those that a row is read for twice come from the L1 cache then.
#include "cuda/device.h"

#include "cuda/eight.h"
#include "cuda/launch.h"
#include "kernels/quantize/quantize_cuda.h"

namespace ow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr uint32_t kInfinity = 0x7f800000;
constexpr float kNotANumber = __builtin_nanf("");

OW_DEVICE uint32_t max_of_warp(uint32_t value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = value > other ? value : other;
  }
  return value;
}

// The largest value of all threads, to all of them.
OW_DEVICE uint32_t max_of_block(uint32_t value) {
  __shared__ uint32_t of_warps[kWarps];
  value = max_of_warp(value);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) value = of_warps[warp] > value ? of_warps[warp] : value;
  return value;
}

// The largest magnitude of a thread's share of x[0, count), `threads` of which share it. Magnitudes
// compare as integers: a NaN is above infinity, and that above every finite value.
template <class T>
OW_DEVICE uint32_t max_of_thread(const T* x, int64_t count, int thread, int threads) {
  uint32_t largest = 0;
  for (int64_t k = thread * kEight; k < count; k += threads * kEight) {
    float v[kEight];
    read_eight(x + k, count - k, v);
    OW_UNROLL
    for (int i = 0; i < kEight; ++i) {
      const uint32_t bits = float_to_bits(v[i]) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
  }
  return largest;
}

// A NaN times zero is NaN.
OW_DEVICE int rounded(float value, float inverse) {
  return inverse == 0.0f ? 0 : ptx::cvt_rni_s32_f32(value * inverse);
}

OW_DEVICE uint32_t four_bytes(const int* codes) {
  return uint32_t(codes[0] & 255) | uint32_t(codes[1] & 255) << 8 | uint32_t(codes[2] & 255) << 16 |
         uint32_t(codes[3]) << 24;
}
// The first `count` of them.
OW_DEVICE void write_codes(int8_t* to, int64_t count, const int (&codes)[kEight]) {
  if (uintptr_t(to) % kEight == 0 && count >= kEight) {
    *reinterpret_cast<uint2*>(to) = {four_bytes(codes), four_bytes(codes + 4)};
    return;
  }
  OW_UNROLL
  for (int i = 0; i < kEight; ++i) {
    if (i < count) to[i] = int8_t(codes[i]);
  }
}

// One digit, one scale a row, which is a block's.
template <class T>
__global__ void __launch_bounds__(kThreads) encode_rows_int8(EncodeArgs args) {
  const int64_t row = blockIdx.x;
  const int thread = int(threadIdx.x);
  const T* x = static_cast<const T*>(args.x) + row * args.stride_x;
  const uint32_t largest_bits = max_of_block(max_of_thread(x, args.k, thread, kThreads));

  const float largest = bits_to_float(largest_bits);
  float scale = largest / 127.0f;
  float inverse = 127.0f / largest;
  if (largest_bits >= kInfinity) {
    scale = kNotANumber;
    inverse = 0.0f;
  } else if (largest < 0x1p-120f) {
    scale = inverse = 0.0f;
  }
  if (thread == 0) args.scales[row] = scale;

  const int64_t end = args.blocks.k_padded;
  for (int64_t k = thread * kEight; k < end; k += kThreads * kEight) {
    float v[kEight];
    read_eight(x + k, args.k - k, v);
    int codes[kEight];
    OW_UNROLL
    for (int i = 0; i < kEight; ++i) codes[i] = rounded(v[i], inverse);
    write_codes(args.codes + row * end + k, end - k, codes);
  }
}

// The low base-256 digit, in -128 .. 127.
OW_DEVICE int low_digit(int value) { return int(int8_t(value)); }

// Three digits, one power-of-two scale a group, which is a warp's.
template <class T>
__global__ void __launch_bounds__(kThreads) encode_rows_fixed(EncodeArgs args) {
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t groups = div_up(args.k, args.group_size);
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t row = warp / groups;
  const int64_t group = warp % groups;
  if (row >= args.m) return;
  const int64_t begin = group * args.group_size;
  const T* x = static_cast<const T*>(args.x) + row * args.stride_x + begin;
  const int64_t count = min_of(args.group_size, args.k - begin);
  const uint32_t largest = max_of_warp(max_of_thread(x, count, lane, kWarp));

  const int exponent = int(largest >> 23) - 127;
  // 1.f * 2^22 is (2^23 + mantissa) / 2 and must not pass 8355711.
  const int shift = (largest & 0x7fffff) > 2 * 8355711u - 0x800000u ? 21 : 22;
  float scale = bits_to_float(uint32_t(exponent - shift + 127) << 23);
  float inverse = bits_to_float(uint32_t(shift - exponent + 127) << 23);
  if (largest >= kInfinity) {
    scale = kNotANumber;
    inverse = 0.0f;
  } else if (exponent < -100) {
    scale = inverse = 0.0f;
  }
  if (lane == 0) args.scales[row * groups + group] = scale;

  // The last group's warp has the padding too.
  const int64_t k_padded = args.blocks.k_padded;
  const int64_t end = group + 1 == groups ? k_padded - begin : count;
  int8_t* out = args.codes + row * 3 * k_padded + begin;
  for (int64_t k = lane * kEight; k < end; k += kWarp * kEight) {
    float v[kEight];
    read_eight(x + k, count - k, v);
    int codes[3][kEight];
    OW_UNROLL
    for (int i = 0; i < kEight; ++i) {
      const int value = rounded(v[i], inverse);
      codes[2][i] = low_digit(value);
      const int rest = (value - codes[2][i]) >> 8;
      codes[1][i] = low_digit(rest);
      codes[0][i] = (rest - codes[1][i]) >> 8;
    }
    OW_UNROLL
    for (int d = 0; d < 3; ++d) write_codes(out + d * k_padded + k, end - k, codes[d]);
  }
}

template <class T>
LaunchStatus launch_typed(const EncodeArgs& args, void* stream) {
  if (args.digits == 1) {
    return launch("encode_rows_int8", encode_rows_int8<T>, dim3(unsigned(args.m)), kThreads, 0,
                  stream, args);
  }
  const int64_t warps = args.m * div_up(args.k, args.group_size);
  return launch("encode_rows_fixed", encode_rows_fixed<T>, dim3(unsigned(div_up(warps, kWarps))),
                kThreads, 0, stream, args);
}

}  // namespace

LaunchStatus launch_encode_rows(const EncodeArgs& args, void* stream) {
  switch (args.x_type) {
    case FloatType::f32: return launch_typed<float>(args, stream);
    case FloatType::bf16: return launch_typed<bf16>(args, stream);
    default: return launch_typed<f16>(args, stream);
  }
}

}  // namespace ow
