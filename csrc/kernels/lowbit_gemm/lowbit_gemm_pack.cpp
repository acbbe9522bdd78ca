#include "kernels/lowbit_gemm/lowbit_gemm.h"

namespace ow {
namespace {

// Where code (lane, k) of a panel lies: `bits` bits at `shift` of `byte`, and for 3 bits the high
// one at `high_shift` of `high_byte`.
struct CodePlace {
  int64_t byte, high_byte;
  int shift, high_shift;
};

CodePlace place_of(int32_t bits, int64_t lane, int64_t k) {
  const int64_t half_bytes = block_bytes(bits) / 2;
  const int64_t half = k / block_k(bits) * block_bytes(bits) + lane / kHalf * half_bytes;
  const int64_t in_line = lane % kHalf * 4 + k % 4;
  const int sub = int(k / 4 % 4);
  switch (bits) {
    case 8: return {half + sub * 64 + in_line, 0, 0, 0};
    case 4: return {half + sub / 2 * 64 + in_line, 0, sub % 2 * 4, 0};
    case 2: return {half + in_line, 0, sub * 2, 0};
    default:
      return {half + k / 16 % 2 * 64 + in_line, half + 128 + in_line, sub * 2, int(k / 4 % 8)};
  }
}

}  // namespace

void pack_lowbit(const LowbitPackArgs& a, const uint8_t* codes, const void* scales,
                 const uint8_t* zeros, uint8_t* packed, void* packed_scales, uint8_t* packed_zeros,
                 const Parallel& parallel) {
  const int64_t bytes = panel_bytes(a.bits, a.k_padded);
  parallel.for_each(div_up(a.n, kPanel), [&](int64_t panel) {
    uint8_t* out = packed + panel * bytes;
    memset(out, 0, size_t(bytes));
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t n = panel * kPanel + lane;
      for (int64_t k = 0; n < a.n && k < a.k; ++k) {
        const CodePlace at = place_of(a.bits, lane, k);
        const int code = codes[n * a.k + k];
        out[at.byte] |= uint8_t((a.bits == 3 ? code & 3 : code) << at.shift);
        if (a.bits == 3) out[at.high_byte] |= uint8_t((code >> 2) << at.high_shift);
      }
      for (int64_t g = 0; g < a.groups; ++g) {
        const int64_t to = (panel * a.groups + g) * kPanel + lane;
        uint8_t* scale = static_cast<uint8_t*>(packed_scales) + to * a.scale_size;
        memset(scale, 0, size_t(a.scale_size));
        if (n < a.n) {
          memcpy(scale, static_cast<const uint8_t*>(scales) + (n * a.groups + g) * a.scale_size,
                 size_t(a.scale_size));
        }
        if (zeros != nullptr) packed_zeros[to] = n < a.n ? zeros[n * a.groups + g] : 0;
      }
    }
  });
}

void unpack_lowbit(const LowbitPackArgs& a, const uint8_t* packed, const void* packed_scales,
                   const uint8_t* packed_zeros, uint8_t* codes, void* scales, uint8_t* zeros,
                   const Parallel& parallel) {
  const int64_t bytes = panel_bytes(a.bits, a.k_padded);
  const int mask = (1 << (a.bits == 3 ? 2 : a.bits)) - 1;
  parallel.for_each(a.n, [&](int64_t n) {
    const int64_t panel = n / kPanel;
    const int64_t lane = n % kPanel;
    const uint8_t* in = packed + panel * bytes;
    for (int64_t k = 0; k < a.k; ++k) {
      const CodePlace at = place_of(a.bits, lane, k);
      int code = (in[at.byte] >> at.shift) & mask;
      if (a.bits == 3) code |= ((in[at.high_byte] >> at.high_shift) & 1) << 2;
      codes[n * a.k + k] = uint8_t(code);
    }
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t from = (panel * a.groups + g) * kPanel + lane;
      memcpy(static_cast<uint8_t*>(scales) + (n * a.groups + g) * a.scale_size,
             static_cast<const uint8_t*>(packed_scales) + from * a.scale_size,
             size_t(a.scale_size));
      if (zeros != nullptr) zeros[n * a.groups + g] = packed_zeros[from];
    }
  });
}

}  // namespace ow
