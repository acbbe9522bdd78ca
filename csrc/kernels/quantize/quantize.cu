// Rows of activations to int8 on a GPU: a block encodes a row. Every number equals the CPU's.
#include "cuda/device.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "kernels/quantize/quantize_cuda.h"

namespace ow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr uint32_t kInfinity = 0x7f800000;
constexpr float kNotANumber = __builtin_nanf("");

// The largest value of all threads, to all of them.
OW_DEVICE uint32_t max_of_block(uint32_t value) {
  __shared__ uint32_t of_warps[kWarps];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = value > other ? value : other;
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) value = of_warps[warp] > value ? of_warps[warp] : value;
  return value;
}

OW_DEVICE int sum_of_warp(int value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

// Magnitudes compare as integers: a NaN is above infinity, and that above every finite value.
template <class T>
OW_DEVICE uint32_t magnitude(T value) {
  return float_to_bits(to_float(value)) & 0x7fffffff;
}

OW_DEVICE int8_t* code_at(const EncodeArgs& args, int64_t digit_row, int64_t k) {
  return args.codes + element_at(args.blocks, digit_row, k);
}

// One digit, one scale a row. A warp encodes a group at a time, because a group has one sum.
template <class T>
__global__ void __launch_bounds__(kThreads) encode_rows_int8(EncodeArgs args) {
  const int64_t row = blockIdx.x;
  const int thread = int(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const T* x = static_cast<const T*>(args.x) + row * args.stride_x;
  uint32_t largest_bits = 0;
  for (int64_t k = thread; k < args.k; k += kThreads) {
    const uint32_t bits = magnitude(x[k]);
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  largest_bits = max_of_block(largest_bits);

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

  // Without sums one "group" a warp's pass is all the same.
  const int64_t span = args.sums != nullptr ? args.group_size : kWarp;
  const int64_t groups = div_up(args.k, span);
  for (int64_t group = warp; group < groups; group += kWarps) {
    const int64_t end = min_of((group + 1) * span, args.k);
    int total = 0;
    for (int64_t k = group * span + lane; k < end; k += kWarp) {
      // A NaN times zero is NaN.
      const int code = inverse == 0.0f ? 0 : ptx::cvt_rni_s32_f32(to_float(x[k]) * inverse);
      *code_at(args, row, k) = int8_t(code);
      total += code;
    }
    if (args.sums != nullptr) {
      total = sum_of_warp(total);
      if (lane == 0) args.sums[row * groups + group] = args.sum_factor * total;
    }
  }
  for (int64_t k = args.k + thread; k < args.blocks.k_padded; k += kThreads) {
    *code_at(args, row, k) = 0;
  }
}

// The low base-256 digit, in -128 .. 127.
OW_DEVICE int low_digit(int value) { return int(int8_t(value)); }

// Three digits, one power-of-two scale a group. A warp encodes a group at a time.
template <class T>
__global__ void __launch_bounds__(kThreads) encode_rows_fixed(EncodeArgs args) {
  const int64_t row = blockIdx.x;
  const int thread = int(threadIdx.x);
  const int lane = thread % kWarp;
  const T* x = static_cast<const T*>(args.x) + row * args.stride_x;
  const int64_t groups = div_up(args.k, args.group_size);
  for (int64_t group = thread / kWarp; group < groups; group += kWarps) {
    const int64_t begin = group * args.group_size;
    const int64_t end = min_of(begin + args.group_size, args.k);
    uint32_t largest = 0;
    for (int64_t k = begin + lane; k < end; k += kWarp) {
      const uint32_t bits = magnitude(x[k]);
      largest = bits > largest ? bits : largest;
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, largest, lanes);
      largest = largest > other ? largest : other;
    }
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
    int total[3] = {0, 0, 0};
    for (int64_t k = begin + lane; k < end; k += kWarp) {
      int rest = inverse == 0.0f ? 0 : ptx::cvt_rni_s32_f32(to_float(x[k]) * inverse);
      for (int d = 2; d >= 0; --d) {
        const int digit = d == 0 ? rest : low_digit(rest);
        rest = (rest - digit) >> 8;
        *code_at(args, row * 3 + d, k) = int8_t(digit);
        total[d] += digit;
      }
    }
    if (args.sums == nullptr) continue;
    for (int d = 0; d < 3; ++d) {
      const int sum = sum_of_warp(total[d]);
      if (lane == 0) args.sums[(row * 3 + d) * groups + group] = args.sum_factor * sum;
    }
  }
  for (int64_t k = args.k + thread; k < args.blocks.k_padded; k += kThreads) {
    for (int d = 0; d < 3; ++d) *code_at(args, row * 3 + d, k) = 0;
  }
}

template <class T>
LaunchStatus launch_typed(const EncodeArgs& args, void* stream) {
  const dim3 grid{unsigned(args.m)};
  if (args.digits == 1) {
    return launch("encode_rows_int8", encode_rows_int8<T>, grid, kThreads, 0, stream, args);
  }
  return launch("encode_rows_fixed", encode_rows_fixed<T>, grid, kThreads, 0, stream, args);
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
