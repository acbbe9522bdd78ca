#include "kernels/lowbit_gemm/lowbit_gemm.h"

namespace ow {
namespace {

float scale_of(FloatType type, const void* scales, int64_t i) {
  switch (type) {
    case FloatType::f32: return static_cast<const float*>(scales)[i];
    case FloatType::bf16: return to_float(static_cast<const bf16*>(scales)[i]);
    default: return to_float(static_cast<const f16*>(scales)[i]);
  }
}

template <class T>
void write_row(const LowbitRowsArgs& a, int64_t n, T* y) {
  const int64_t lane = n % kPanel;
  const uint8_t* panel = a.w + n / kPanel * panel_bytes(a.bits, a.k_padded);
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t at = (n / kPanel * a.groups + g) * kPanel + lane;
    const float scale = scale_of(a.w_scales_type, a.w_scales, at);
    const int zero = a.w_zeros == nullptr ? 1 << (a.bits - 1) : a.w_zeros[at];
    for (int64_t k = g * a.group_size; k < min_of((g + 1) * a.group_size, a.k); ++k) {
      from_float(scale * float(code_of(a.bits, panel, lane, k) - zero), y + k);
    }
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
        const CodePlace at = code_place(a.bits, lane, k);
        const int code = codes[n * a.k + k];
        out[at.byte] |= uint8_t((code & ((1 << at.bits) - 1)) << at.shift);
        if (at.bits < a.bits) out[at.high_byte] |= uint8_t((code >> at.bits) << at.high_shift);
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
  parallel.for_each(a.n, [&](int64_t n) {
    const int64_t panel = n / kPanel;
    const int64_t lane = n % kPanel;
    const uint8_t* in = packed + panel * bytes;
    for (int64_t k = 0; k < a.k; ++k) codes[n * a.k + k] = code_of(a.bits, in, lane, k);
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t from = (panel * a.groups + g) * kPanel + lane;
      memcpy(static_cast<uint8_t*>(scales) + (n * a.groups + g) * a.scale_size,
             static_cast<const uint8_t*>(packed_scales) + from * a.scale_size,
             size_t(a.scale_size));
      if (zeros != nullptr) zeros[n * a.groups + g] = packed_zeros[from];
    }
  });
}

void block_bf16_rows(const bf16* x, int64_t m, int64_t k, const RowBlocks& blocks, bf16* out,
                     const Parallel& parallel) {
  const int64_t tasks = min_of(parallel.threads, m);
  parallel.for_each(tasks, [&](int64_t task) {
    for (int64_t row = m * task / tasks; row < m * (task + 1) / tasks; ++row) {
      bf16* to = out + element_at(blocks, row, 0);
      for (int64_t unit = 0; unit < blocks.k_padded; unit += blocks.k) {
        const int64_t count = unit < k ? min_of(blocks.k, k - unit) : 0;
        memcpy(to, x + row * k + unit, size_t(count) * sizeof(bf16));
        memset(to + count, 0, size_t(blocks.k - count) * sizeof(bf16));
        to += blocks.rows * blocks.k;
      }
    }
  });
}

void lowbit_rows(const LowbitRowsArgs& a, const Parallel& parallel) {
  // Codes below which waking a thread costs more than it saves.
  constexpr int64_t kCodesPerTask = 4096;
  const int64_t work = div_up(a.count * a.k, kCodesPerTask);
  const int64_t tasks = min_of(min_of(parallel.threads, a.count), work);
  parallel.for_each(tasks, [&](int64_t task) {
    for (int64_t i = a.count * task / tasks; i < a.count * (task + 1) / tasks; ++i) {
      switch (a.y_type) {
        case FloatType::f32: write_row(a, a.rows[i], static_cast<float*>(a.y) + i * a.k); break;
        case FloatType::bf16: write_row(a, a.rows[i], static_cast<bf16*>(a.y) + i * a.k); break;
        case FloatType::f16: write_row(a, a.rows[i], static_cast<f16*>(a.y) + i * a.k); break;
      }
    }
  });
}

}  // namespace ow
