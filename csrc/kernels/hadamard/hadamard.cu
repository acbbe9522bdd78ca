// The Walsh-Hadamard transform on a GPU. Every number equals the CPU's, because the stages come in
// the same order. The bits of an element's place in its block, from the lowest, say who holds it:
//
//   3          which of the eight elements that a lane reads at once      stages in registers
//   5          the lane                                                   shuffles
//   log kParts which of the parts, 256 elements each, of its warp         registers
//   log kWarps the warp                                                   registers, after a turn
//                                                                         through shared memory
//
// Blocks of up to 256 elements lie in one warp and stop early.
//
// x is read and y written once, which is the floor. By data sheet an A100 brings 4 bytes of 16-bit
// x and y for each of its multiprocessors every 0.3 cycles; in that time the stages of 4096
// elements and the conversions keep its adders, and the shuffles its shared memory, busy for 0.25.
#include "cuda/device.h"

#include "cuda/eight.h"
#include "cuda/launch.h"
#include "kernels/hadamard/hadamard_cuda.h"

namespace ow {
namespace {

constexpr int kPart = kWarp * kEight;
constexpr int kThreads = 256;  // of hadamard_in_warps

OW_DEVICE void write_pair(float* y, float low, float high) {
  *reinterpret_cast<uint2*>(y) = {float_to_bits(low), float_to_bits(high)};
}
template <class T>
OW_DEVICE void write_pair(T* y, float low, float high) {
  *reinterpret_cast<uint32_t*>(y) = pack(low, high, y);
}

OW_DEVICE void write_four(float* y, float a, float b, float c, float d) {
  *reinterpret_cast<uint4*>(y) = {float_to_bits(a), float_to_bits(b), float_to_bits(c),
                                  float_to_bits(d)};
}
template <class T>
OW_DEVICE void write_eight(T* y, int64_t count, const float (&v)[kEight], float scale) {
  if (count >= kEight) {
    if constexpr (sizeof(T) == 4) {
      write_four(y, v[0] * scale, v[1] * scale, v[2] * scale, v[3] * scale);
      write_four(y + 4, v[4] * scale, v[5] * scale, v[6] * scale, v[7] * scale);
    } else {
      *reinterpret_cast<uint4*>(y) = {
          pack(v[0] * scale, v[1] * scale, y), pack(v[2] * scale, v[3] * scale, y),
          pack(v[4] * scale, v[5] * scale, y), pack(v[6] * scale, v[7] * scale, y)};
    }
    return;
  }
  OW_UNROLL
  for (int i = 0; i < kEight; ++i) {
    if (i < count) from_float(v[i] * scale, y + i);
  }
}

OW_DEVICE void butterfly(float* low, float* high) {
  const float difference = *low - *high;
  *low += *high;
  *high = difference;
}

// The stages h < block among the 256 elements of each part.
template <int kParts>
OW_DEVICE void stages_of_warp(float (&v)[kParts][kEight], int64_t block, int lane) {
  OW_UNROLL
  for (int h = 1; h < kEight; h *= 2) {
    if (h >= block) return;
    OW_UNROLL
    for (int j = 0; j < kParts; ++j) {
      OW_UNROLL
      for (int i = 0; i < kEight; ++i) {
        if ((i & h) == 0) butterfly(&v[j][i], &v[j][i + h]);
      }
    }
  }
  OW_UNROLL
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    if (lanes * kEight >= block) return;
    // A product with one is exact.
    const float sign = (lane & lanes) == 0 ? 1.0f : -1.0f;
    OW_UNROLL
    for (int j = 0; j < kParts; ++j) {
      OW_UNROLL
      for (int i = 0; i < kEight; ++i) {
        v[j][i] = sign * v[j][i] + __shfl_xor_sync(kAllLanes, v[j][i], lanes);
      }
    }
  }
}

// Blocks of up to 256 elements, which a warp holds one or more of.
template <class T>
__global__ void __launch_bounds__(kThreads) hadamard_in_warps(HadamardArgs args) {
  const int64_t first = (int64_t(blockIdx.x) * kThreads + int(threadIdx.x)) * kEight;
  const int64_t count = args.blocks * args.block - first;
  float v[1][kEight];
  read_eight(static_cast<const T*>(args.x) + first, count, v[0]);
  stages_of_warp(v, args.block, int(threadIdx.x) % kWarp);
  write_eight(static_cast<T*>(args.y) + first, count, v[0], args.scale);
}

// Parts that turn through shared memory together: with all eight of a block of 32768 it would take
// more than some GPUs have.
template <int kParts>
constexpr int kTurn = kParts < 4 ? kParts : 4;

// A block of 256 kParts kWarps elements.
template <class T, int kParts, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp) hadamard_in_blocks(HadamardArgs args) {
  constexpr int kSpan = kTurn<kParts> * kPart;  // of a warp, in shared memory
  constexpr int kPairs = 2 * kWarps * kWarp;    // elements that the threads take at once
  static_assert(kSpan % kPairs == 0);
  const int thread = int(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int64_t begin = int64_t(blockIdx.x) * kParts * kPart * kWarps;
  const T* x = static_cast<const T*>(args.x) + begin + warp * kParts * kPart + lane * kEight;
  T* y = static_cast<T*>(args.y) + begin;
  float v[kParts][kEight];
  OW_UNROLL
  for (int j = 0; j < kParts; ++j) read_eight(x + j * kPart, kEight, v[j]);
  stages_of_warp(v, kPart, lane);
  OW_UNROLL
  for (int h = 1; h < kParts; h *= 2) {
    OW_UNROLL
    for (int j = 0; j < kParts; ++j) {
      OW_UNROLL
      for (int i = 0; i < kEight; ++i) {
        if ((j & h) == 0) butterfly(&v[j][i], &v[j + h][i]);
      }
    }
  }

  float* shared = reinterpret_cast<float*>(dynamic_shared());
  OW_UNROLL
  for (int j0 = 0; j0 < kParts; j0 += kTurn<kParts>) {
    if (j0 != 0) __syncthreads();
    OW_UNROLL
    for (int j = 0; j < kTurn<kParts>; ++j) {
      // Of eight lanes that write 16 bytes each, four begin with their second half, so that they
      // meet all banks.
      const bool late = (lane & 4) != 0;
      const float(&own)[kEight] = v[j0 + j];
      float* to = shared + warp * kSpan + j * kPart + lane * kEight;
      write_four(to + (late ? 4 : 0), late ? own[4] : own[0], late ? own[5] : own[1],
                 late ? own[6] : own[2], late ? own[7] : own[3]);
      write_four(to + (late ? 0 : 4), late ? own[0] : own[4], late ? own[1] : own[5],
                 late ? own[2] : own[6], late ? own[3] : own[7]);
    }
    __syncthreads();
    OW_UNROLL
    for (int i = 0; i < kSpan; i += kPairs) {
      const int at = i + 2 * thread;
      float pair[2][kWarps];
      OW_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        const uint2 bits = *reinterpret_cast<const uint2*>(shared + w * kSpan + at);
        pair[0][w] = bits_to_float(bits.x);
        pair[1][w] = bits_to_float(bits.y);
      }
      OW_UNROLL
      for (int h = 1; h < kWarps; h *= 2) {
        OW_UNROLL
        for (int w = 0; w < kWarps; ++w) {
          if ((w & h) != 0) continue;
          butterfly(&pair[0][w], &pair[0][w + h]);
          butterfly(&pair[1][w], &pair[1][w + h]);
        }
      }
      OW_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        write_pair(y + (w * kParts + j0) * kPart + at, pair[0][w] * args.scale,
                   pair[1][w] * args.scale);
      }
    }
  }
}

template <class T, int kParts, int kWarps>
LaunchStatus launch_blocks(const HadamardArgs& args, void* stream) {
  constexpr int kBytes = kWarps * kTurn<kParts> * kPart * int(sizeof(float));
  return launch("hadamard_in_blocks", hadamard_in_blocks<T, kParts, kWarps>,
                dim3(unsigned(args.blocks)), kWarps * kWarp, kBytes, stream, args);
}

template <class T>
LaunchStatus launch_typed(const HadamardArgs& args, void* stream) {
  switch (args.block) {
    case 512: return launch_blocks<T, 1, 2>(args, stream);
    case 1024: return launch_blocks<T, 1, 4>(args, stream);
    case 2048: return launch_blocks<T, 2, 4>(args, stream);
    case 4096: return launch_blocks<T, 2, 8>(args, stream);
    case 8192: return launch_blocks<T, 4, 8>(args, stream);
    case 16384: return launch_blocks<T, 4, 16>(args, stream);
    case 32768: return launch_blocks<T, 8, 16>(args, stream);
  }
  const int64_t count = args.blocks * args.block;
  return launch("hadamard_in_warps", hadamard_in_warps<T>,
                dim3(unsigned(div_up(count, kThreads * kEight))), kThreads, 0, stream, args);
}

}  // namespace

LaunchStatus launch_hadamard(const HadamardArgs& args, void* stream) {
  switch (args.type) {
    case FloatType::f32: return launch_typed<float>(args, stream);
    case FloatType::bf16: return launch_typed<bf16>(args, stream);
    default: return launch_typed<f16>(args, stream);
  }
}

}  // namespace ow
