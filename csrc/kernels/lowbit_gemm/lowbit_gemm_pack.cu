// Packing, unpacking and rows of the weight on a GPU: byte for byte what the CPU's functions give.
#include "cuda/device.h"

#include "cuda/faults.h"
#include "cuda/launch.h"
#include "kernels/lowbit_gemm/lowbit_gemm_cuda.h"

namespace ow {
namespace {

constexpr int kThreads = 128;
constexpr float kNotANumber = __builtin_nanf("");

dim3 blocks_for(int64_t threads) { return dim3(unsigned(div_up(threads, kThreads))); }
OW_DEVICE int64_t global_thread() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

// A thread has the bytes of a lane's k % 4 in a k_block: one in each line of a half.
__global__ void __launch_bounds__(kThreads)
    pack_codes(LowbitPackArgs a, const uint8_t* codes, uint8_t* packed) {
  const int64_t lane = global_thread() / 4 % kPanel;
  const int64_t k_block = global_thread() / 4 / kPanel % (a.k_padded / block_k(a.bits));
  const int64_t panel = global_thread() / 4 / kPanel / (a.k_padded / block_k(a.bits));
  if (panel >= div_up(a.n, kPanel)) return;
  constexpr int64_t kLine = 64;
  const int64_t n = panel * kPanel + lane;
  const int64_t first_k = k_block * block_k(a.bits) + global_thread() % 4;
  const int64_t first_byte = code_place(a.bits, lane, first_k).byte;
  uint32_t lines = 0;  // a byte each
  for (int64_t k = first_k; k < (k_block + 1) * block_k(a.bits); k += 4) {
    if (n >= a.n || k >= a.k) continue;
    const CodePlace at = code_place(a.bits, lane, k);
    const uint32_t code = codes[n * a.k + k];
    const int line = int((at.byte - first_byte) / kLine);
    lines |= (code & ((1u << at.bits) - 1)) << (8 * line + at.shift);
    if (at.bits == a.bits) continue;
    const int high_line = int((at.high_byte - first_byte) / kLine);
    lines |= (code >> at.bits) << (8 * high_line + at.high_shift);
  }
  uint8_t* out = packed + panel * panel_bytes(a.bits, a.k_padded) + first_byte;
  for (int line = 0; line < int(block_bytes(a.bits) / 2 / kLine); ++line) {
    out[line * kLine] = uint8_t(lines >> (8 * line));
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_codes(LowbitPackArgs a, const uint8_t* packed, uint8_t* codes) {
  const int64_t n = global_thread() / a.k;
  const int64_t k = global_thread() % a.k;
  if (n >= a.n) return;
  const uint8_t* panel = packed + n / kPanel * panel_bytes(a.bits, a.k_padded);
  codes[n * a.k + k] = code_of(a.bits, panel, n % kPanel, k);
}

// Scales or zero points [n, groups] to [panels, groups, 32], zero past n, and back.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_groups(LowbitPackArgs a, const T* in, T* out) {
  const int64_t n = global_thread() / (a.groups * kPanel) * kPanel + global_thread() % kPanel;
  const int64_t group = global_thread() / kPanel % a.groups;
  if (global_thread() >= round_up(a.n, kPanel) * a.groups) return;
  out[global_thread()] = n < a.n ? in[n * a.groups + group] : T{0};
}
template <class T>
__global__ void __launch_bounds__(kThreads) unpack_groups(LowbitPackArgs a, const T* in, T* out) {
  const int64_t n = global_thread() / a.groups;
  if (n >= a.n) return;
  const int64_t group = global_thread() % a.groups;
  out[global_thread()] = in[(n / kPanel * a.groups + group) * kPanel + n % kPanel];
}

template <class T>
LaunchStatus launch_pack_groups(const LowbitPackArgs& args, const void* in, void* out,
                                void* stream) {
  return launch("pack_groups", pack_groups<T>, blocks_for(round_up(args.n, kPanel) * args.groups),
                kThreads, 0, stream, args, static_cast<const T*>(in), static_cast<T*>(out));
}
template <class T>
LaunchStatus launch_unpack_groups(const LowbitPackArgs& args, const void* in, void* out,
                                  void* stream) {
  return launch("unpack_groups", unpack_groups<T>, blocks_for(args.n * args.groups), kThreads, 0,
                stream, args, static_cast<const T*>(in), static_cast<T*>(out));
}

// A block a row.
template <class T>
__global__ void __launch_bounds__(kThreads) lowbit_rows(LowbitRowsArgs a, int64_t n) {
  const int64_t row = a.rows[blockIdx.x];
  T* y = static_cast<T*>(a.y) + blockIdx.x * a.k;
  const bool exists = row >= 0 && row < n;
  const int64_t lane = row % kPanel;
  const uint8_t* panel = a.w + row / kPanel * panel_bytes(a.bits, a.k_padded);
  for (int64_t k = threadIdx.x; k < a.k; k += kThreads) {
    float value = kNotANumber;
    if (exists) {
      const int64_t at = (row / kPanel * a.groups + k / a.group_size) * kPanel + lane;
      const int zero = a.w_zeros == nullptr ? 1 << (a.bits - 1) : a.w_zeros[at];
      const int code = code_of(a.bits, panel, lane, k);
      value = read_float(a.w_scales, a.w_scales_type, at) * float(code - zero);
    }
    from_float(value, y + k);
  }
}

// A block a row.
__global__ void __launch_bounds__(kThreads)
    pad_rows(const uint16_t* x, int64_t k, int64_t k_padded, uint16_t* out) {
  x += blockIdx.x * k;
  out += blockIdx.x * k_padded;
  for (int64_t i = threadIdx.x; i < k_padded; i += kThreads) out[i] = i < k ? x[i] : uint16_t{0};
}

template <class T>
LaunchStatus launch_rows_typed(const LowbitRowsArgs& args, int64_t n, void* stream) {
  return launch("lowbit_rows", lowbit_rows<T>, dim3(unsigned(args.count)), kThreads, 0, stream,
                args, n);
}

}  // namespace

LaunchStatus launch_find_lowbit_faults(const LowbitPackArgs& args, const uint8_t* codes,
                                       const void* scales, FloatType scales_type,
                                       const uint8_t* zeros, void* scratch, LowbitFaults* faults,
                                       void* stream) {
  LowbitFaults* found = static_cast<LowbitFaults*>(scratch);
  const int64_t code_count = args.n * args.k;
  const int64_t group_count = args.n * args.groups;
  LaunchStatus status = fill_bytes(found, 0xff, sizeof(LowbitFaults), stream);
  if (status.error == 0) {
    status = launch("find_wide_codes", find_wide_codes, blocks_for(code_count), kThreads, 0, stream,
                    codes, code_count, args.bits, &found->code);
  }
  if (status.error == 0 && zeros != nullptr) {
    status = launch("find_wide_codes", find_wide_codes, blocks_for(group_count), kThreads, 0,
                    stream, zeros, group_count, args.bits, &found->zero);
  }
  if (status.error == 0) {
    status = launch("find_infinite_scales", find_infinite_scales, blocks_for(group_count), kThreads,
                    0, stream, scales, scales_type, group_count, &found->scale);
  }
  if (status.error != 0) return status;
  return read_back(faults, found, sizeof(LowbitFaults), stream);
}

LaunchStatus launch_pack_lowbit(const LowbitPackArgs& args, const uint8_t* codes,
                                const void* scales, const uint8_t* zeros, uint8_t* packed,
                                void* packed_scales, uint8_t* packed_zeros, void* stream) {
  const int64_t threads = round_up(args.n, kPanel) * (args.k_padded / block_k(args.bits)) * 4;
  LaunchStatus status = launch("pack_codes", pack_codes, blocks_for(threads), kThreads, 0, stream,
                               args, codes, packed);
  if (status.error != 0) return status;
  status = args.scale_size == 4 ? launch_pack_groups<uint32_t>(args, scales, packed_scales, stream)
                                : launch_pack_groups<uint16_t>(args, scales, packed_scales, stream);
  if (status.error != 0 || zeros == nullptr) return status;
  return launch_pack_groups<uint8_t>(args, zeros, packed_zeros, stream);
}

LaunchStatus launch_unpack_lowbit(const LowbitPackArgs& args, const uint8_t* packed,
                                  const void* packed_scales, const uint8_t* packed_zeros,
                                  uint8_t* codes, void* scales, uint8_t* zeros, void* stream) {
  LaunchStatus status = launch("unpack_codes", unpack_codes, blocks_for(args.n * args.k), kThreads,
                               0, stream, args, packed, codes);
  if (status.error != 0) return status;
  status = args.scale_size == 4
               ? launch_unpack_groups<uint32_t>(args, packed_scales, scales, stream)
               : launch_unpack_groups<uint16_t>(args, packed_scales, scales, stream);
  if (status.error != 0 || zeros == nullptr) return status;
  return launch_unpack_groups<uint8_t>(args, packed_zeros, zeros, stream);
}

LaunchStatus launch_lowbit_rows(const LowbitRowsArgs& args, int64_t n, void* stream) {
  switch (args.y_type) {
    case FloatType::f32: return launch_rows_typed<float>(args, n, stream);
    case FloatType::bf16: return launch_rows_typed<bf16>(args, n, stream);
    default: return launch_rows_typed<f16>(args, n, stream);
  }
}

LaunchStatus launch_pad_rows(const void* x, int64_t m, int64_t k, void* out, void* stream) {
  return launch("pad_rows", pad_rows, dim3(unsigned(m)), kThreads, 0, stream,
                static_cast<const uint16_t*>(x), k, round_up(k, kPadK),
                static_cast<uint16_t*>(out));
}

}  // namespace ow
